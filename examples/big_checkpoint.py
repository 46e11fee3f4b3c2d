"""Measures the peak memory of exporting a random checkpoint with the shapes of Qwen3-30B-A3B and few layers.

    python examples/big_checkpoint.py --layers 2,4                     load and pack only
    python examples/big_checkpoint.py --layers 2,4 --target sm_90      and lower

Each layer takes 1.2 GB on disk. Files are written to a temporary folder in --folder, which is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from executorch_moe.export.build import stream
from executorch_moe.export.checkpoint.work_folder import WorkFolder
from executorch_moe.export.host_memory import peak_rss, restart_peak
from executorch_moe.export.models.pretrained import resolve
from executorch_moe.export.options import Experts, ExportOptions, Target
from executorch_moe.export.pipeline import export_model

EXPERTS_A_FILE = 32


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Qwen3-MoE model, by default those of Qwen3-30B-A3B, except for the number of layers."""

    layers: int
    num_experts: int = 128
    top_k: int = 8
    hidden_size: int = 2048
    intermediate_size: int = 768
    heads: int = 32
    key_value_heads: int = 4
    head_dim: int = 128
    vocab_size: int = 151936

    def layer_bytes(self) -> int:
        """Bytes of one layer's experts in bf16."""
        return 2 * 3 * self.num_experts * self.hidden_size * self.intermediate_size


def write_checkpoint(shape: ModelShape, folder: Path) -> None:
    """Writes a model folder as on the Hub: one matrix for each expert, in sharded safetensors with an index."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim, num_experts=shape.num_experts, num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.intermediate_size, intermediate_size=3 * shape.hidden_size,
        max_position_embeddings=4096, tie_word_embeddings=False, norm_topk_prob=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    shutil.copy(resolve("tiny") / "tokenizer.json", folder)
    files = list(_files(shape))
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number, sizes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file({key: _values(size, generator) for key, size in sizes.items()}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(sizes, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def _values(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, size[-1] ** -0.5, generator=generator)


def _files(shape: ModelShape) -> list[dict[str, tuple[int, ...]]]:
    """The files of the checkpoint, each as tensor name -> shape."""
    h, i = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    files: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (shape.vocab_size, h)}]
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        files.append(
            {
                f"{name}.self_attn.q_proj.weight": (queries, h),
                f"{name}.self_attn.k_proj.weight": (keys, h),
                f"{name}.self_attn.v_proj.weight": (keys, h),
                f"{name}.self_attn.o_proj.weight": (h, queries),
                f"{name}.self_attn.q_norm.weight": (shape.head_dim,),
                f"{name}.self_attn.k_norm.weight": (shape.head_dim,),
                f"{name}.input_layernorm.weight": (h,),
                f"{name}.post_attention_layernorm.weight": (h,),
                f"{name}.mlp.gate.weight": (shape.num_experts, h),
            }
        )
        for first in range(0, shape.num_experts, EXPERTS_A_FILE):
            files.append({})
            for expert in range(first, min(first + EXPERTS_A_FILE, shape.num_experts)):
                for matrix, size in (("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i))):
                    files[-1][f"{name}.mlp.experts.{expert}.{matrix}.weight"] = size
    files.append({"model.norm.weight": (h,), "lm_head.weight": (shape.vocab_size, h)})
    return files


def export_options(folder: Path, out: Path, options: dict[str, Any]) -> ExportOptions:
    """The options of an export, from those of this script."""
    experts = Experts(options["scheme"], options["group_size"])
    return ExportOptions(str(folder), out, experts=experts, target=Target(options["target"], options["dtype"]))


def measure_load(folder: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Packs and loads a checkpoint in this process; peak memory after each layer, and of all."""
    streamed = stream(export_options(folder, out, options), folder)
    with WorkFolder(out.with_suffix(".work"), streamed.manifest()) as work:
        restart_peak()
        peaks = [peak_rss()]
        records = streamed.load(work, lambda record: peaks.append(peak_rss()))
        work.remove()
    dense = sum(parameter.nbytes for parameter in streamed.model.parameters())
    packed = sum(record.bytes_after for record in records)
    return {"start": peaks[0], "layers": peaks[1:], "loaded": peak_rss(), "packed": packed, "dense": dense}


def measure_export(folder: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Exports a checkpoint in this process; peak memory of each step."""
    return export_model(export_options(folder, out, options)).peaks


def in_own_process(what: str, folder: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Runs `measure_load` ("load") or `measure_export` ("export") in a fresh Python process."""
    request = json.dumps({"what": what, "folder": str(folder), "out": str(out), "options": options})
    command = [sys.executable, "-m", "executorch_moe.examples.big_checkpoint", "--child", request]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def child(request: dict[str, Any]) -> None:
    """Runs a measurement in a process that `in_own_process` started."""
    measure = {"load": measure_load, "export": measure_export}[request["what"]]
    print(json.dumps(measure(Path(request["folder"]), Path(request["out"]), request["options"])))


def gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def report(shape: ModelShape, below: Path, options: dict[str, Any], export: bool) -> None:
    """Writes a checkpoint, measures and prints, and removes it."""
    with tempfile.TemporaryDirectory(prefix="big_checkpoint_", dir=below) as name:
        folder, out = Path(name) / "model", Path(name) / "model.pte"
        write_checkpoint(shape, folder)
        found = in_own_process("load", folder, out, options)
        model = found["packed"] + found["dense"]
        limit = model + shape.layer_bytes()
        print(f"{shape.layers} layers: packed experts {gb(found['packed'])}, all else {gb(found['dense'])}")
        print(f"  limit: packed model + one layer in bf16 = {gb(model)} + {gb(shape.layer_bytes())} = {gb(limit)}")
        print(f"  Python, torch and ExecuTorch before loading: {gb(found['start'])}")
        print(f"  peak after each layer: {', '.join(gb(peak) for peak in found['layers'])}")
        print(f"  peak with everything loaded: {gb(found['loaded'])}, {found['loaded'] / limit:.0%} of the limit")
        if export:
            peaks = in_own_process("export", folder, out, options)
            print("  peak of each step of the export: " + ", ".join(f"{k} {gb(v)}" for k, v in peaks.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the peak memory of exporting a big checkpoint.")
    parser.add_argument("--layers", default="2,4", help="numbers of layers, separated by commas")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for temporary files")
    parser.add_argument("--vocab-size", type=int, default=ModelShape.vocab_size)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--dtype", default="bf16", help="dtype of everything but the experts")
    parser.add_argument("--target", default="", help="also lower and write for this target: cpu, sm_90, ...")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(json.loads(arguments.child))
    options = {
        "target": arguments.target or "cpu",
        "scheme": arguments.scheme,
        "group_size": arguments.group_size,
        "dtype": arguments.dtype,
    }
    for layers in (int(part) for part in arguments.layers.split(",")):
        shape = ModelShape(layers, vocab_size=arguments.vocab_size)
        print(json.dumps(asdict(shape)))
        report(shape, arguments.folder, options, export=bool(arguments.target))


if __name__ == "__main__":
    main()
