"""Caches that start at zero: what they take on the disk while an artifact is written, and in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from emulated_cuda import lower_emulated, open_cpu_container
from executorch.backends.cuda import cuda_weight_collector
from torch.export import export

from executorch_moe.backends.artifact.files import check, open_artifact, save
from executorch_moe.backends.cuda.empty_buffers import _PART, LEAST_BYTES, digest_of_zeros, empty_buffers, is_empty
from executorch_moe.backends.runtime.delegate_host import DelegateHost

ROWS, WIDTH = 1024, 2048
CACHE_BYTES = 4 * ROWS * WIDTH


class Caches(torch.nn.Module):
    """Three caches of 8 MiB that start at zero, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            self.register_buffer(name, torch.zeros(ROWS, WIDTH))
        self.register_buffer("d", torch.ones(4, WIDTH))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        for factor, cache in enumerate((self.a, self.b, self.c, self.d), 1):
            cache[position] = cache[position] + factor * x
        return self.a[position] + self.b[position] + self.c[position] + self.d[position]


def test_zeros_are_not_written(tmp_path: Path) -> None:
    with empty_buffers():
        write = cuda_weight_collector._write_tensor_storage
        digest = write(torch.zeros(CACHE_BYTES // 4), str(tmp_path / "empty"))
        other = write(torch.ones(CACHE_BYTES // 4), str(tmp_path / "full"))
    status = (tmp_path / "empty").stat()
    assert (status.st_size, status.st_blocks) == (CACHE_BYTES, 0)
    for name, given in (("empty", digest), ("full", other)):
        assert hashlib.sha256((tmp_path / name).read_bytes()).digest() == given, name


@pytest.mark.slow
@pytest.mark.exhaustive
def test_empty_caches_take_no_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, written = cuda_weight_collector._write_tensor_storage, []

    def write(tensor: torch.Tensor, path: str) -> bytes:
        written.append(tensor.untyped_storage().nbytes())
        return bytes(stock(tensor, path))

    monkeypatch.setattr(cuda_weight_collector, "_write_tensor_storage", write)
    inputs = torch.ones(1, WIDTH), torch.tensor([3])
    program = export(Caches(), inputs)
    with empty_buffers():
        artifact = save(lower_emulated({"decode": program}), tmp_path / "caches")
    assert max(written) == 16 * WIDTH, "the zeros were written to temporary files"

    assert check(artifact.pte, verify_bytes=True) == artifact
    opened, data = open_artifact(artifact.pte)
    assert data is not None
    keys = {name: f"cuda_fqn_weight:cpu:{name}" for name in "abcd"}
    assert [data.sizes()[keys[name]] for name in "abc"] == [CACHE_BYTES] * 3
    assert [data.is_empty(keys[name]) for name in "abcd"] == [True, True, True, False]
    status = artifact.ptd.stat()
    assert CACHE_BYTES < status.st_size < 2 * CACHE_BYTES, "caches of one size are one range of the file"
    assert 512 * status.st_blocks < CACHE_BYTES // 2, "which is a hole"

    host = DelegateHost(opened, data, torch.device("cpu"), open_container=open_cpu_container)
    for _ in range(2):
        for step in (1, 2):
            (out,) = host.run("decode", inputs)
            assert out.unique().tolist() == [10.0 * step + 1]
        host.reset()


def test_only_large_storages_of_zeros_are_empty() -> None:
    assert is_empty(torch.zeros(LEAST_BYTES, dtype=torch.uint8)) and is_empty(
        torch.zeros(2 * _PART + 4, dtype=torch.int8)
    )
    assert not is_empty(torch.zeros(LEAST_BYTES - 1, dtype=torch.uint8))
    for place in (0, _PART, -1):
        tensor = torch.zeros(2 * _PART + 4, dtype=torch.uint8)
        tensor[place] = 1
        assert not is_empty(tensor) and not is_empty(tensor[4:8]), "the storage counts"
    assert not is_empty(torch.zeros(LEAST_BYTES, device="meta"))
    for size in (LEAST_BYTES, 2 * _PART + 4):
        assert digest_of_zeros(size) == hashlib.sha256(bytes(size)).digest()
