"""Every model of the comparison, made from one GGUF: what is there already is not made again."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from entries import CHECKPOINT, GGUF, OURS, TEXT, TOWER
from environments import python_of
from processes import ProcessError, run

HERE = Path(__file__).resolve().parent
LIMIT_S = 1800
GROUPS_OF_32 = ("--weight-format", "int4", "--group-size", "32", "--ratio", "1.0", "--sym")
TASK = "task"


@dataclass(frozen=True)
class Step:
    """Commands, one after the other, that make a model.

    Attributes:
        keeps: a model that the same commands have made before is taken; ours are made by the code that is measured.
    """

    name: str
    commands: tuple[tuple[str | Path, ...], ...]
    keeps: bool = True


def steps(models: Path, environments: Path, gguf: Path) -> Iterator[Step]:
    """Every model but the checkpoint, which they are made from."""
    hf, llamacpp, openvino, ortgenai = (
        python_of(environments, name) for name in ("hf", "llamacpp", "openvino", "ortgenai")
    )
    yield Step(TOWER, ((hf, HERE / "clip_gguf.py", models / CHECKPOINT, models / TOWER),))
    yield Step(GGUF, ((llamacpp, HERE / "quantize_gguf.py", gguf, models / GGUF, "Q4_0"),))
    export = (openvino.with_name("optimum-cli"), "export", "openvino", "--task", "image-text-to-text")
    for name, form in (("openvino-int4", GROUPS_OF_32), ("openvino-fp32", ("--weight-format", "fp32"))):
        yield Step(name, ((*export, "--model", models / CHECKPOINT, *form, models / name),))
    builder = (ortgenai, "-m", "onnxruntime_genai.models.builder", "-i", models / TEXT, "-p", "int4", "-e", "cpu")
    yield Step("ortgenai-int4", ((*builder, "-o", models / "ortgenai-int4", "-c", models / "cache"),))
    program = Path(sys.executable).with_name("llava-deploy")
    for one in OURS:
        yield Step(
            one.name,
            (
                (program, "export", models / CHECKPOINT, "-o", models / one.name, *one.export),
                (program, "build", models / one.name, "--backend", "onnxruntime", *one.build),
            ),
            keeps=False,
        )


def make_models(models: Path, environments: Path, gguf: Path, wanted: set[str]) -> dict[str, str]:
    """Make the checkpoint, the task and those of the models that are wanted; why others could not be made, by name."""
    models.mkdir(parents=True, exist_ok=True)
    if not (models / TASK).is_dir():
        remove(models / CHECKPOINT)
        made = [models / name for name in (CHECKPOINT, TEXT, TASK)]
        run([python_of(environments, "hf"), HERE / "smol_llava.py", gguf, *made], LIMIT_S)
    failed = {}
    for step in steps(models, environments, gguf):
        if step.name not in wanted:
            continue
        try:
            make(step, models)
        except ProcessError as error:
            failed[step.name] = str(error)
    return failed


def make(step: Step, models: Path) -> None:
    """Make a model, unless it is kept and there; what failed or was made otherwise is removed."""
    target, record = models / step.name, models / f"{step.name}.made-by"
    commands = "\n".join(" ".join(Path(part).name for part in command) for command in step.commands)
    if step.keeps and target.exists() and record.is_file() and record.read_text(encoding="utf-8") == commands:
        return
    remove(target)
    began = time.monotonic()
    for command in step.commands:
        program = Path(command[0])
        # Some of the programs call others of their environment by name.
        path = {"PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]])}
        try:
            run(command, LIMIT_S, path)
        except ProcessError:
            remove(target)
            raise
    if step.name.startswith("openvino"):
        settings = "preprocessor_config.json"  # OpenVINO GenAI reads no other, and the export may leave it out
        shutil.copyfile(models / CHECKPOINT / settings, target / settings)
    record.write_text(commands, encoding="utf-8")
    print(f"{step.name}: made in {time.monotonic() - began:.0f} s", flush=True)


def remove(path: Path) -> None:
    """Remove a file or a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def megabytes(*paths: Path) -> float:
    """On disk, in millions of bytes."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)
