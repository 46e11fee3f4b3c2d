// Checks that a .pte and a .ptd are whole and belong together, before ExecuTorch reads them (docs/integrity.md).
//
// The last 128 bytes of the .pte are: "executorch_moe 1", size and digest of the .pte without them, size and digest of the
// .ptd, and the SHA-256 of the 96 bytes before. A digest is the SHA-256 of the SHA-256 of each chunk of 16 MiB.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace artifact {

using Digest = std::array<uint8_t, 32>;

// SHA-256 (FIPS 180-4) of a memory block.
inline Digest sha256(const uint8_t* data, size_t size) {
  static const uint32_t K[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
      0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
      0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
      0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
      0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
      0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  auto rotate = [](uint32_t x, int n) { return (x >> n) | (x << (32 - n)); };
  auto block = [&](const uint8_t* bytes) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      w[i] = uint32_t(bytes[4 * i]) << 24 | uint32_t(bytes[4 * i + 1]) << 16 | uint32_t(bytes[4 * i + 2]) << 8 | bytes[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
      const uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t v[8];
    std::copy(h, h + 8, v);
    for (int i = 0; i < 64; ++i) {
      const uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
      const uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
      const uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
      const uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
      std::copy_backward(v, v + 7, v + 8);
      v[4] += t1;
      v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; ++i) {
      h[i] += v[i];
    }
  };
  const size_t whole = size / 64 * 64;
  for (size_t at = 0; at < whole; at += 64) {
    block(data + at);
  }
  uint8_t last[128] = {};
  std::memcpy(last, data + whole, size - whole);
  last[size - whole] = 0x80;
  const size_t end = size - whole < 56 ? 64 : 128;
  for (int i = 0; i < 8; ++i) {
    last[end - 1 - i] = uint8_t((uint64_t(size) * 8) >> (8 * i));
  }
  for (size_t at = 0; at < end; at += 64) {
    block(last + at);
  }
  Digest digest;
  for (int i = 0; i < 32; ++i) {
    digest[i] = uint8_t(h[i / 4] >> (24 - 8 * (i % 4)));
  }
  return digest;
}

// Digest of the first `size` bytes of a file.
inline Digest file_digest(const std::string& path, uint64_t size) {
  constexpr uint64_t kChunk = 16 << 20;
  std::ifstream file(path, std::ios::binary);
  std::vector<uint8_t> chunk, digests;
  for (uint64_t start = 0; start < size; start += chunk.size()) {
    chunk.resize(std::min(kChunk, size - start));
    if (!file.read(reinterpret_cast<char*>(chunk.data()), std::streamsize(chunk.size()))) {
      throw std::runtime_error(path + " cannot be read");
    }
    const Digest digest = sha256(chunk.data(), chunk.size());
    digests.insert(digests.end(), digest.begin(), digest.end());
  }
  return sha256(digests.data(), digests.size());
}

inline uint64_t file_size(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) {
    throw std::runtime_error(path + " cannot be opened");
  }
  return uint64_t(file.tellg());
}

// Throws std::runtime_error if a file is damaged, or the .ptd belongs to another .pte.
inline void check(const std::string& pte, const std::string& ptd) {
  constexpr size_t kFields = 96, kTrailer = 128;
  const uint64_t size = file_size(pte);
  uint8_t trailer[kTrailer] = {};
  if (size > kTrailer) {
    std::ifstream file(pte, std::ios::binary);
    file.seekg(std::streamoff(size - kTrailer)).read(reinterpret_cast<char*>(trailer), kTrailer);
  }
  auto number = [&](size_t at) {
    uint64_t value = 0;
    for (int i = 7; i >= 0; --i) {
      value = value << 8 | trailer[at + size_t(i)];
    }
    return value;
  };
  auto equal = [&](const Digest& digest, size_t at) { return std::memcmp(digest.data(), trailer + at, digest.size()) == 0; };
  if (std::memcmp(trailer, "executorch_moe 1", 16) != 0 || !equal(sha256(trailer, kFields), kFields)) {
    throw std::runtime_error(pte + " has no digests at its end: it is damaged, or executorch-moe did not write it");
  }
  if (number(16) != size - kTrailer || !equal(file_digest(pte, size - kTrailer), 24)) {
    throw std::runtime_error(pte + " is damaged: copy both files of the export again");
  }
  if (number(56) != file_size(ptd) || !equal(file_digest(ptd, number(56)), 64)) {
    throw std::runtime_error(ptd + " is damaged or of another export: copy both files of the export again");
  }
}

} // namespace artifact
