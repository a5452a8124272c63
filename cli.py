"""The command line: thin, and each command imports what it needs when it runs, so that it starts at once."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from llava_deploy.engines.names import Precision
from llava_deploy.runtime.command_group import (
    PROGRAM,
    CommandLine,
    examples,
    options_as_one,
    quiet,
    refuse_given,
    remember,
    say,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_deploy.exporter.checkpoint import Checkpoint
    from llava_deploy.runtime import Llava
    from llava_deploy.runtime.terminal_run import AnswerOptions


@dataclass(frozen=True)
class _Source:
    """A checkpoint and what the options say about it."""

    directory: Path
    vision_tower: Path | None
    projector: Path | None
    lora: Path | None
    conversation: str | None

    def open(self) -> Checkpoint:
        """Open it with its options."""
        from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint

        options = CheckpointOptions(self.vision_tower, self.projector, self.lora, self.conversation)
        return open_checkpoint(self.directory, options)


def _say_unused(checkpoint: Checkpoint) -> None:
    """Config keys that this version knows nothing of are said, not passed over."""
    if checkpoint.unused_keys:
        say(f"config keys that have no effect here: {', '.join(checkpoint.unused_keys)}")


@dataclass(frozen=True)
class _Answering:
    """What ``run`` and ``chat`` ask of a model."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    max_len: int | None
    threads: int | None

    def options(self) -> AnswerOptions:
        from llava_deploy.runtime import SamplingOptions
        from llava_deploy.runtime.terminal_run import AnswerOptions

        sampling = SamplingOptions(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)
        return AnswerOptions(self.max_new_tokens, sampling, self.stop)

    def load(self, bundle: Path) -> Llava:
        return _load(bundle, self.max_len, self.threads)


def _load(bundle: Path, max_len: int | None, threads: int | None) -> Llava:
    from llava_deploy.engines.manifest import read_manifest
    from llava_deploy.runtime import Llava

    waiting: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if sys.stderr.isatty() and sum(entry.size for entry in read_manifest(bundle).files) > _LOADS_AT_ONCE:
        from llava_deploy.runtime import terminal  # Rich takes its time: a small bundle is loaded before it is there

        waiting = terminal.progress("loading", quiet=quiet())
    with waiting:
        llava = Llava.load(bundle, max_len=max_len, threads=threads)
    say(llava.backend)
    return llava


_LOADS_AT_ONCE = 256 << 20
"""Bytes: a bundle up to this size is loaded in less than a second."""

_path = click.Path(path_type=Path)
_source = options_as_one(
    "source",
    _Source,
    click.argument("directory", type=_path, metavar="CHECKPOINT"),
    click.option("--vision-tower", type=_path, metavar="DIR", help="Tower of an original-layout checkpoint."),
    click.option("--projector", type=_path, metavar="FILE", help="Projector-only file to lay over a base model."),
    click.option("--lora", type=_path, metavar="DIR", help="LoRA adapter in PEFT layout to merge."),
    click.option(
        "--conversation", metavar="NAME", help="Instead of its template: vicuna_v1, llama_2, mistral or plain."
    ),
)
_answering = options_as_one(
    "answering",
    _Answering,
    click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."),
    click.option("--top-k", type=int, help="Draw from this many tokens only."),
    click.option("--top-p", type=float, help="Draw from the likeliest tokens that reach this probability."),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less."),
    click.option("--seed", type=int, help="Draw the same every time."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable."),
    click.option("--max-len", type=int, help="Tokens of context: prompt, pictures and answer."),
    click.option("--threads", type=int, help="Of one operator; by default one a physical core."),
)
_bundle = click.argument("bundle", type=_path)
_images = click.option(
    "--image", "images", multiple=True, metavar="PICTURE", help="Path, data URI, or - for standard input; repeatable."
)
_raw = click.option("--raw", is_flag=True, help="Take the prompt as it is, without the model's template.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _pictures(sources: tuple[str, ...]) -> list[Image]:
    """Load pictures: a wrong path is known before a model is loaded."""
    from llava_deploy.runtime.pictures import load_picture

    return [load_picture(sys.stdin.buffer.read() if source == "-" else source) for source in sources]


@click.group(PROGRAM, CommandLine, epilog=examples("demo", "run --help"))
@click.version_option(package_name=PROGRAM, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, expose_value=False, callback=remember, help="Show an error's traceback.")
def main() -> None:
    """Take a LLaVA checkpoint to a running answer.

    A checkpoint is exported to a bundle, a bundle is built for a backend, and then it answers questions about pictures.
    """


@main.command(epilog=examples("inspect llava-1.5-7b-hf", "inspect bundle --json"))
@_source
@_json
def inspect(source: _Source, as_json: bool) -> None:
    """Say what a checkpoint or a bundle is.

    Of a checkpoint, everything that an export would use, and what it would leave out.
    """
    from llava_deploy.engines.manifest import MANIFEST_NAME, read_manifest
    from llava_deploy.runtime import terminal

    if (source.directory / MANIFEST_NAME).is_file():
        refuse_given("of no effect on a bundle", "vision_tower", "projector", "lora", "conversation")
        manifest = read_manifest(source.directory)
        terminal.show(dataclasses.asdict(manifest) if as_json else terminal.bundle_facts(source.directory, manifest))
        return
    from llava_deploy.exporter.inspect_report import describe
    from llava_deploy.exporter.tables import checkpoint_table

    description = describe(source.open())
    terminal.show(description if as_json else checkpoint_table(description))


@main.command(epilog=examples("export llava-1.5-7b-hf -o bundle --precision fp16"))
@_source
@click.option("-o", "--output", type=_path, required=True, metavar="BUNDLE", help="Directory to write.")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp32", show_default=True)
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
def export(source: _Source, output: Path, precision: Precision, force: bool) -> None:
    """Turn a checkpoint into a bundle.

    That is a directory with two ONNX graphs, the token embeddings, the tokenizer and a manifest, all of one piece: it
    is there when it is whole, or not at all.
    """
    from llava_deploy.runtime import terminal

    watch = terminal.Stopwatch()
    with terminal.progress("exporting", quiet=quiet()) as step:
        from llava_deploy.exporter.export import export as write

        checkpoint = source.open()
        manifest = write(checkpoint, output, precision, replace=force, on_progress=lambda at: step(at.done, at.total))
    total = terminal.size(sum(entry.size for entry in manifest.files))
    say(f"{manifest.model.parameters:,} parameters in {precision}, {total}, in {watch}")
    _say_unused(checkpoint)
    say(f"next: {PROGRAM} build {output} --backend onnxruntime")
    click.echo(output)


@main.command(epilog=examples("build bundle --backend onnxruntime"))
@_bundle
@click.option("--backend", type=click.Choice(["onnxruntime"]), default="onnxruntime", show_default=True)
@click.option("--force", is_flag=True, help="Build again what is there already.")
def build(bundle: Path, backend: str, force: bool) -> None:
    """Make a bundle's engine for one backend."""
    from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
    from llava_deploy.runtime import terminal

    watch = terminal.Stopwatch()
    with terminal.progress("building", quiet=quiet()):
        engine = build_onnxruntime(bundle, replace=force)
    say(f"built for {backend} in {watch}")
    say(f"next: {PROGRAM} chat {bundle} --image PICTURE")
    click.echo(engine)


@main.command(
    epilog=examples(
        "run bundle --image photo.jpg --prompt 'What is this?'",
        "run bundle --image photo.jpg --raw --prompt 'USER: <image> What is this? ASSISTANT:'",
    )
)
@_bundle
@_images
@click.option("--prompt", required=True, help="The question; <image> in it says where a picture goes.")
@_raw
@_answering
@_json
def run(bundle: Path, images: tuple[str, ...], prompt: str, raw: bool, as_json: bool, answering: _Answering) -> None:
    """Answer one question.

    Standard output gets the answer and nothing else, as it comes.
    """
    from llava_deploy.runtime.terminal_run import Output, Request, Template, run_request

    options = answering.options()
    request = Request(prompt, _pictures(images), Template.RAW if raw else Template.MODEL)
    run_request(answering.load(bundle), request, options, Output.JSON if as_json else Output.TEXT, say)


@main.command(epilog=examples("chat bundle --image photo.jpg"))
@_bundle
@_images
@_answering
def chat(bundle: Path, images: tuple[str, ...], answering: _Answering) -> None:
    """Talk about pictures in the terminal.

    Lines that begin with / are commands; /help lists them.
    """
    from llava_deploy.runtime.terminal_chat import Conversation, converse, standard_terminal

    options = answering.options()
    pictures = _pictures(images)
    llava = answering.load(bundle)
    converse(Conversation(llava, options), standard_terminal(llava.max_len, say), pictures)


@main.command(
    "eval", epilog=examples("eval bundle", "eval fp32 fp16 int4", "eval bundle --data questions.jsonl --json")
)
@click.argument("bundles", type=_path, nargs=-1, required=True, metavar="BUNDLE [BUNDLE ...]")
@click.option("--data", type=_path, metavar="FILE", help='JSON lines {"image", "question", "answer"[, "kind"]}.')
@click.option("--per-kind", type=int, default=100, show_default=True, help="Drawn questions of each kind.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawn pictures.")
@click.option("--blank", is_flag=True, help="Show a blank picture every time: what is right then is guessed.")
@click.option("--batch", type=int, default=1, show_default=True, help="Questions at once.")
@click.option("--max-new-tokens", type=int, default=32, show_default=True, help="Longest answer.")
@_json
def evaluate(
    bundles: tuple[Path, ...],
    data: Path | None,
    per_kind: int,
    seed: int,
    blank: bool,
    batch: int,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Measure how often a bundle answers right, or compare several.

    Without --data it is asked about drawn pictures that the tiny model of this package has never seen, and 'chance'
    is what guessing would get right. An answer counts if it is the wanted one: exactly, but for case, runs of spaces,
    a full stop at the end and Unicode's compatibility forms (NFKC).

    Of several bundles of one model, the first is what the others are compared with, token by token along its greedy
    answers: how often both would choose the same next token, and the mean KL divergence, in nats, of the next token's
    distribution from the first one's. They are loaded one after the other.
    """
    from llava_deploy.exporter.demo.questions import chances, drawn_questions
    from llava_deploy.runtime.evaluation import EvalOptions, Shown, read_questions
    from llava_deploy.runtime.terminal_eval import Exam, examine
    from llava_deploy.runtime.terminal_run import Output

    if data is not None:
        refuse_given("of no effect with --data, whose questions are all asked", "per_kind", "seed")
    options = EvalOptions(Shown.BLANK if blank else Shown.PICTURE, batch, max_new_tokens)
    questions = drawn_questions(per_kind, seed) if data is None else read_questions(data)
    exam = Exam(questions, options, chances() if data is None else {})
    examine(bundles, exam, lambda bundle: _load(bundle, None, None), Output.JSON if as_json else Output.TEXT)


@main.command(epilog=examples("verify llava-1.5-7b-hf bundle", "verify checkpoint bundle --image photo.jpg --json"))
@_source
@_bundle
@click.option("--image", metavar="PICTURE", help="By default one that is drawn.")
@click.option("--prompt", default="What is in the picture?", show_default=True, help="The question about it.")
@_raw
@click.option("--max-new-tokens", type=int, default=32, show_default=True, help="Tokens to compare.")
@_json
def verify(
    source: _Source, bundle: Path, image: str | None, prompt: str, raw: bool, max_new_tokens: int, as_json: bool
) -> None:
    """Compare a bundle with PyTorch.

    Both get the same picture and prompt, and are compared stage by stage: pixels, tower layer by layer, projector,
    splice, decoder layer by layer, logits, tokens. Fails where a stage leaves its tolerance, and names the first.
    """
    from llava_deploy.engines.errors import LlavaDeployError
    from llava_deploy.engines.manifest import read_manifest
    from llava_deploy.exporter.demo.questions import drawn_picture
    from llava_deploy.exporter.tables import stage_table
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.terminal_run import Request, Template, prompt_of

    picture = drawn_picture() if image is None else _pictures((image,))[0]
    request = Request(prompt, [picture], Template.RAW if raw else Template.MODEL)
    text = prompt_of(request, read_manifest(bundle).chat)
    with terminal.progress("comparing with PyTorch", quiet=quiet()):
        from llava_deploy.exporter.verify import verify as compare

        checkpoint = source.open()
        report = compare(checkpoint, bundle, prompt=text, picture=picture, max_new_tokens=max_new_tokens)
    _say_unused(checkpoint)
    terminal.show(report.to_dict() if as_json else stage_table(report.stages))
    if report.first_failure is not None:
        raise LlavaDeployError(f"{report.first_failure} is the first stage out of tolerance")


@main.command(epilog=examples("demo", "demo -o elsewhere --seed 7"))
@click.option("-o", "--output", type=_path, default=Path("demo-output"), show_default=True, metavar="DIR")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawn pictures.")
def demo(output: Path, seed: int) -> None:
    """Go the whole way with the shipped tiny LLaVA.

    Export, build, questions about pictures drawn on the spot, the comparison with PyTorch, and timings.
    """
    from llava_deploy.engines.errors import LlavaDeployError
    from llava_deploy.runtime import terminal

    with terminal.progress("loading PyTorch", quiet=quiet()):
        from llava_deploy.exporter.demo.showcase import showcase

    if problems := showcase(output, seed, terminal.out()):
        raise LlavaDeployError("; ".join(problems))


@main.command(epilog=examples("completion bash >> ~/.bashrc"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    click.echo(kind(main, {}, PROGRAM, f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()).source())
