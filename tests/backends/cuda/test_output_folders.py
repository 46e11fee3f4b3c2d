"""Concurrent exports of one program do not overwrite each other's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from emulated_cuda import WIDTH, cuda_backend_on_cpu, lower_emulated, open_cpu_container, stateful_programs
from executorch.backends.cuda.cuda_backend import CudaBackend
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.export import ExportedProgram

from executorch_moe.backends.artifact.files import open_artifact, save
from executorch_moe.backends.cuda.output_folders import own_outputs
from executorch_moe.backends.runtime.delegate_host import DelegateHost


def peek() -> dict[str, ExportedProgram]:
    return {"peek": stateful_programs()[1]["peek"]}


@pytest.mark.exhaustive
def test_an_export_that_ends_while_another_reads_its_library(tmp_path: Path) -> None:
    """The other export runs after the first has compiled. With shared folders it would remove the first's library."""
    others: list[Path] = []
    libraries: list[str] = []

    def compiled(cls: type, so_path: str, compile_specs: Any) -> None:
        libraries.append(so_path)
        if len(libraries) == 1:
            others.append(save(lower_emulated(peek()), tmp_path / "other").pte)

    with mock.patch.object(CudaBackend, "codesign_so", classmethod(compiled)):
        first = save(lower_emulated(peek()), tmp_path / "first")
    assert len(set(libraries)) == 2
    for pte in (first.pte, *others):
        host = DelegateHost(*open_artifact(pte), torch.device("cpu"), open_container=open_cpu_container)
        assert torch.equal(host.run("peek", (torch.ones(WIDTH),))[0], torch.zeros(WIDTH))


def test_every_method_has_a_folder_of_its_own_in_the_cache() -> None:
    with cuda_backend_on_cpu():
        stock = CudaBackend.get_aoti_compile_options([])
        with own_outputs():
            first, second = (CudaBackend.get_aoti_compile_options([]) for _ in range(2))
        assert CudaBackend.get_aoti_compile_options([]) == stock
    folders = {options.pop("aot_inductor.output_path") for options in (first, second)}
    assert first == second == stock and len(folders) == 2
    assert all(Path(folder).is_dir() and Path(folder).parent == Path(cache_dir()) for folder in folders)
