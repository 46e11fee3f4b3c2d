// Generates tokens with an exported model in ExecuTorch's C++ runtime: token ids in, token ids out.
//
//   runner MODEL.pte MAX_NEW_TOKENS [--temperature T] [--top-p P] [--seed N] [--chunk N] [--cuda-graph] < ids > ids
//
// MODEL.ptd is the file of the same name. Tokenizing is left to the caller, because ExecuTorch's package has no C++ tokenizer
// (docs/cpp.md shows one way). It takes exports of every --output.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>

#include "artifact_digests.h"

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

namespace {

struct Options {
  std::string pte;
  size_t max_new_tokens = 0;
  float temperature = 0.0f, top_p = 1.0f;
  int64_t seed = 0;
  size_t chunk = 512;
  bool cuda_graph = false;
};

Options parse(int argc, char** argv) {
  if (argc < 3) {
    throw std::invalid_argument("usage: runner MODEL.pte MAX_NEW_TOKENS [--temperature T] [--top-p P] [--seed N] "
                                "[--chunk N] [--cuda-graph] < ids > ids");
  }
  Options options;
  options.pte = argv[1];
  options.max_new_tokens = std::stoul(argv[2]);
  for (int i = 3; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--cuda-graph") {
      options.cuda_graph = true;
      continue;
    }
    if (i + 1 == argc) {
      throw std::invalid_argument(name + " is unknown or needs a value");
    }
    const std::string value = argv[++i];
    if (name == "--temperature") {
      options.temperature = std::stof(value);
    } else if (name == "--top-p") {
      options.top_p = std::stof(value);
    } else if (name == "--seed") {
      options.seed = std::stoll(value);
    } else if (name == "--chunk") {
      options.chunk = std::max<size_t>(1, std::stoul(value));
    } else {
      throw std::invalid_argument(name + " is unknown");
    }
  }
  return options;
}

class Model {
 public:
  explicit Model(const Options& options) : options_(options) {
    const std::string ptd = options.pte.substr(0, options.pte.rfind(".pte")) + ".ptd";
    artifact::check(options.pte, ptd);
    if (options.cuda_graph) { // read when a method is loaded
      executorch::runtime::BackendOptions<1> graph;
      check(graph.set_option("enable_cuda_graph_for_method", "decode"), "the option of the CUDA graph");
      check(executorch::runtime::set_option("CudaBackend", graph.view()), "CudaBackend");
    }
    // On the CPU, shared arenas are what shares the KV cache of the two methods.
    module_ = std::make_unique<Module>(
        options.pte, ptd, Module::LoadMode::Mmap, nullptr, nullptr, nullptr, /*share_memory_arenas=*/true);
    check(module_->load(), options.pte);
    names_ = module_->method_names().get();
    context = size_t(module_->get("get_max_context_len").get().toInt());
    output_ = std::string(module_->get("get_method_output").get().toString());
    const auto eos_ids = module_->execute("get_eos_ids");
    check(eos_ids.error(), "get_eos_ids");
    for (const EValue& token : eos_ids.get()) {
      ends.insert(token.toInt());
    }
    prefill_ = method("prefill");
    decode_ = method("decode");
    // Both before the first call: loading a method writes the initial values of the buffers that it shares.
    check(module_->load_method(prefill_), prefill_);
    check(module_->load_method(decode_), decode_);
  }

  // The token after `count` tokens, the first of which has this position.
  int64_t next(int64_t* tokens, size_t count, size_t position) {
    std::vector<int64_t> positions(count);
    std::iota(positions.begin(), positions.end(), int64_t(position));
    const int size = int(count);
    std::vector<TensorPtr> tensors = {
        from_blob(tokens, {1, size}, ScalarType::Long), from_blob(positions.data(), {size}, ScalarType::Long)};
    if (output_ == "token" || output_ == "engine") {
      tensors.push_back(from_blob(&options_.temperature, {1}, ScalarType::Float));
    }
    if (output_ == "token") {
      tensors.push_back(from_blob(&options_.top_p, {1}, ScalarType::Float));
      tensors.push_back(from_blob(&options_.seed, {1}, ScalarType::Long));
    }
    const std::vector<EValue> inputs(tensors.begin(), tensors.end()); // which do not own the tensors
    const std::string& name = count > 1 ? prefill_ : decode_;
    auto outputs = module_->execute(name, inputs);
    check(outputs.error(), name);
    const auto tensor = outputs->at(0).toTensor();
    if (output_ == "token" || output_ == "greedy") {
      return tensor.const_data_ptr<int64_t>()[0];
    }
    if (output_ == "engine") {
      return std::llrint(tensor.const_data_ptr<float>()[0]);
    }
    const float* logits = tensor.const_data_ptr<float>();
    return std::max_element(logits, logits + tensor.numel()) - logits;
  }

  size_t context = 0;
  std::set<int64_t> ends;

 private:
  static void check(Error error, const std::string& what) {
    if (error != Error::Ok) {
      throw std::runtime_error(what + ": " + executorch::runtime::to_string(error));
    }
  }

  // Name of a method in the program: as it is, for the CPU, or the prompt's method of a program with --output logits.
  std::string method(const std::string& name) const {
    for (const std::string& candidate : {name, name + "@cpu", std::string(name == "prefill" ? "forward" : "")}) {
      if (names_.count(candidate)) {
        return candidate;
      }
    }
    throw std::runtime_error(options_.pte + " has no method " + name + " for this machine");
  }

  Options options_;
  std::unique_ptr<Module> module_;
  std::unordered_set<std::string> names_;
  std::string output_, prefill_, decode_;
};

} // namespace

int main(int argc, char** argv) try {
  const Options options = parse(argc, argv);
  Model model(options);
  std::vector<int64_t> ids;
  for (int64_t id; std::cin >> id;) {
    ids.push_back(id);
  }
  if (ids.empty() || ids.size() > model.context) {
    throw std::invalid_argument("the prompt has " + std::to_string(ids.size()) + " tokens: give 1 to " +
                                std::to_string(model.context));
  }
  // The last new token needs no position in the cache.
  const size_t end = std::min(ids.size() + options.max_new_tokens, model.context + 1);
  for (size_t cached = 0; ids.size() < end;) {
    const size_t count = std::min(options.chunk, ids.size() - cached);
    const int64_t token = model.next(ids.data() + cached, count, cached);
    cached += count;
    if (cached < ids.size()) {
      continue; // a chunk of the prompt
    }
    std::cout << token << ' ' << std::flush;
    if (model.ends.count(token)) {
      break;
    }
    ids.push_back(token);
  }
  std::cout << '\n';
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 2;
}
