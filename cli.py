"""The command line: thin, and each command imports what it needs when it runs, so that it starts at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from llava_deploy.engines.names import (
    DEFAULT_ACCURACY_LEVEL,
    AccuracyLevel,
    Backend,
    Int8Part,
    Precision,
)
from llava_deploy.exporter.command_demo import demo
from llava_deploy.exporter.command_record import goldens_of, goldens_option, record
from llava_deploy.exporter.command_source import (
    OF_CHECKPOINTS,
    Source,
    quantizing_options,
    say_unused,
    source_options,
)
from llava_deploy.exporter.command_swap import swap
from llava_deploy.exporter.command_verify import verify
from llava_deploy.exporter.quantization.request import QuantizeRequest
from llava_deploy.runtime.command_archive import describe_archive, pack, unpack
from llava_deploy.runtime.command_bench import BenchRequest, bench_options, run_bench
from llava_deploy.runtime.command_build import TensorRtRequest, refuse_tensorrt_options, tensorrt_options
from llava_deploy.runtime.command_completion import completion
from llava_deploy.runtime.command_doctor import run_doctor
from llava_deploy.runtime.command_eval import EvalRequest, eval_options
from llava_deploy.runtime.command_group import (
    PROGRAM,
    CommandLine,
    examples,
    quiet,
    refuse_given,
    remember,
    say,
)
from llava_deploy.runtime.command_options import (
    PATH,
    Answering,
    answering_options,
    images_option,
    json_option,
    load_bundle,
    load_pictures,
    raw_option,
)
from llava_deploy.runtime.command_plan import PlanRequest, plan_options
from llava_deploy.runtime.command_report import ReportRequest, report_options, run_report
from llava_deploy.runtime.command_selftest import SelftestRequest, run_selftest, selftest_options
from llava_deploy.runtime.command_serve import serve
from llava_deploy.runtime.printable import as_argument

if TYPE_CHECKING:
    from llava_deploy.runtime.bench.bench import BoundOf


_accuracy_level = click.option(
    "--accuracy-level",
    type=click.Choice(get_args(AccuracyLevel)),
    help="Of int4 in ONNX Runtime: 4 multiplies in int8, 1 in float32.",
)
_bundle = click.argument("bundle", type=PATH)


@click.group(PROGRAM, CommandLine, epilog=examples("demo", "run --help"))
@click.version_option(package_name=PROGRAM, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, expose_value=False, callback=remember, help="Show an error's traceback.")
def main() -> None:
    """Take a LLaVA checkpoint to a running answer.

    A checkpoint is exported to a bundle, a bundle is built for a backend, and then it answers questions about pictures.
    """


@click.command(epilog=examples("inspect llava-1.5-7b-hf", "inspect bundle --json"))
@source_options
@json_option
def inspect(source: Source, as_json: bool) -> None:
    """Say what a checkpoint, a bundle or an archive is.

    Of a checkpoint, everything that an export would use, and what it would leave out.
    """
    from llava_deploy.engines.manifest import MANIFEST_NAME, read_manifest
    from llava_deploy.runtime import terminal

    if source.directory.is_file():
        refuse_given("of no effect on an archive", *OF_CHECKPOINTS)
        terminal.show(describe_archive(source.directory, as_json=as_json))
        return
    if (source.directory / MANIFEST_NAME).is_file():
        refuse_given("of no effect on a bundle", *OF_CHECKPOINTS)
        manifest = read_manifest(source.directory)
        terminal.show(dataclasses.asdict(manifest) if as_json else terminal.bundle_facts(source.directory, manifest))
        return
    from llava_deploy.exporter.inspect_report import describe
    from llava_deploy.exporter.tables import checkpoint_table

    description = describe(source.open())
    terminal.show(description if as_json else checkpoint_table(description))


@click.command(
    epilog=examples("plan bundle --board orin-nano-8gb --max-len 2048", "plan llava-1.5-7b-hf --precision int4 --json")
)
@source_options
@plan_options
def plan(source: Source, request: PlanRequest) -> None:
    """Say whether a model fits a board before anything is made.

    Peak memory of export, build and run with every backend, by what it is for and where it lies; the largest batch and
    length that would fit; and the speed of decoding that the memory's bandwidth allows. No weight is read.
    """
    from llava_deploy.engines.manifest import MANIFEST_NAME, read_manifest
    from llava_deploy.engines.planner.boards import find_board
    from llava_deploy.engines.planner.machine import this_machine
    from llava_deploy.engines.planner.plan import plan as make_plan
    from llava_deploy.engines.planner.plan import resolve_sizes

    target = this_machine() if request.board == "auto" else find_board(request.board)
    if (source.directory / MANIFEST_NAME).is_file():
        from llava_deploy.engines.planner.model import planned_bundle

        refuse_given("of no effect on a bundle", *OF_CHECKPOINTS, "precision", "group_size")
        model = planned_bundle(source.directory, read_manifest(source.directory))
    else:
        from llava_deploy.exporter.plan_source import planned_checkpoint
        from llava_deploy.exporter.quantization.prepare import require_useful

        wanted: Precision = "fp16" if request.precision is None else request.precision
        checkpoint = source.open()
        quantizing = QuantizeRequest(request.group_size, symmetric=False, lm_head=None, calibration=None, device=None)
        require_useful(checkpoint, wanted, quantizing)
        model = planned_checkpoint(checkpoint, wanted, quantizing.options())
    sizes = resolve_sizes(model, request.max_batch, request.max_len, request.max_images)
    made = make_plan(model, target, sizes, request.parts).to_dict()
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.terminal_plan import plan_tables

    terminal.show(made if request.as_json else plan_tables(made))


@click.command(epilog=examples("export llava-1.5-7b-hf -o bundle --precision fp16"))
@source_options
@click.option("-o", "--output", type=PATH, required=True, metavar="BUNDLE", help="Directory to write.")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="fp32", show_default=True)
@quantizing_options
@_accuracy_level
@goldens_option
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
def export(
    source: Source,
    output: Path,
    precision: Precision,
    quantizing: QuantizeRequest,
    accuracy_level: AccuracyLevel | None,
    goldens: bool,
    force: bool,
) -> None:
    """Turn a checkpoint into a bundle.

    That is a directory with two ONNX graphs, the token embeddings, the tokenizer and a manifest, all of one piece: it
    is there when it is whole, or not at all.

    int4 rounds the decoder's weights to the nearest step, or keeps those of a checkpoint that is quantised already;
    int4-awq searches steps that suit the activations of calibration prompts, layer by layer. What it has found is in
    BUNDLE.awq until the export is done: after a stop, the same command goes on from there.

    With --goldens the bundle also carries PyTorch's answers to a few questions, for a self-test where it runs; see
    record, which adds them later. An export of floats without them neither needs PyTorch nor memory for a model.
    """
    from llava_deploy.runtime import terminal

    if precision in ("fp32", "fp16"):
        refuse_given(f"of no effect with --precision {precision}", "accuracy_level")
    watch = terminal.Stopwatch()
    with terminal.progress("quantising" if precision == "int4-awq" else "opening", quiet=quiet()) as step:
        from llava_deploy.engines.staging import require_free_name
        from llava_deploy.exporter.export import export as write
        from llava_deploy.exporter.export import no_goldens
        from llava_deploy.exporter.quantization.prepare import prepare

        require_free_name(output, replace=force)
        work = output.with_name(f"{output.name}.awq")
        searching = precision == "int4-awq" or not goldens  # --device is the recording's too
        request = quantizing if searching else dataclasses.replace(quantizing, device=None)
        checkpoint = prepare(source.open(), precision, request, work, step)
    with contextlib.ExitStack() as bars:
        recorder = goldens_of(checkpoint, quantizing.device, bars) if goldens else no_goldens
        step = bars.enter_context(terminal.progress("exporting", quiet=quiet()))
        level = DEFAULT_ACCURACY_LEVEL if accuracy_level is None else accuracy_level
        manifest = write(
            checkpoint,
            output,
            precision,
            accuracy_level=level,
            replace=force,
            on_progress=lambda at: step(at.done, at.total),
            record=recorder,
        )
    if precision == "int4-awq":
        from llava_deploy.exporter.quantization.awq.state import remove_work

        if not remove_work(work):  # of use to a search that was stopped only
            say(f"{work}: left where it is, since it is a link, or somebody else uses it")
    total = terminal.size(sum(entry.size for entry in manifest.files))
    say(f"{manifest.model.parameters:,} parameters in {precision}, {total}, in {watch}")
    say_unused(checkpoint)
    say(f"next: {PROGRAM} build {as_argument(output)} --backend onnxruntime")
    click.echo(output)


@click.command(
    epilog=examples(
        "build bundle --backend onnxruntime", "build bundle --backend tensorrt-rtx --sm sm89 --max-len 2048"
    )
)
@_bundle
@click.option("--backend", type=click.Choice(get_args(Backend)), default="onnxruntime", show_default=True)
@_accuracy_level
@click.option(
    "--int8",
    multiple=True,
    type=click.Choice(get_args(Int8Part)),
    help="Of onnxruntime: compute the tower or long steps in 8-bit integers; faster, less exact; repeatable.",
)
@tensorrt_options
@click.option("--force", is_flag=True, help="Build again what is there already, and where memory may not do.")
def build(
    bundle: Path,
    backend: Backend,
    accuracy_level: AccuracyLevel | None,
    int8: tuple[Int8Part, ...],
    tensorrt: TensorRtRequest,
    force: bool,
) -> None:
    """Make a bundle's engine for one backend.

    onnxruntime: on this machine's processor. onnxruntime-cuda: for any NVIDIA GPU; it needs none. tensorrt: for this
    machine's GPU. tensorrt-rtx: TensorRT for RTX, for any GPUs that --sm names, this machine's by default; it needs
    none.

    An engine of TensorRT takes what it was built for and no more: prompts at once, tokens of context, pictures at once.
    """
    from llava_deploy.runtime import terminal

    watch = terminal.Stopwatch()
    no_effect = f"of no effect with --backend {backend}"
    if backend == "onnxruntime" or backend == "onnxruntime-cuda":
        refuse_tensorrt_options(no_effect)
    if backend != "onnxruntime":
        refuse_given(no_effect, "accuracy_level", "int8")
    if backend == "onnxruntime":
        from llava_deploy.engines.onnxruntime_builder import build_onnxruntime

        with terminal.progress("building", quiet=quiet()):
            engine = build_onnxruntime(bundle, accuracy_level=accuracy_level, int8=int8, replace=force)
    elif backend == "onnxruntime-cuda":
        from llava_deploy.engines.onnxruntime_cuda_builder import build_onnxruntime_cuda

        with terminal.progress("building", quiet=quiet()):
            engine = build_onnxruntime_cuda(bundle, replace=force)
    else:
        from llava_deploy.engines.tensorrt.builder import build_tensorrt
        from llava_deploy.engines.tensorrt.options import TensorRtBuildOptions

        options = TensorRtBuildOptions(
            backend=backend,
            max_batch=tensorrt.max_batch,
            max_len=tensorrt.max_len,
            max_images=tensorrt.max_images,
            max_seq=tensorrt.max_seq,
            opt_batch=tensorrt.opt_batch,
            opt_seq=tensorrt.opt_seq,
            opt_total=tensorrt.opt_total,
            opt_images=tensorrt.opt_images,
            capabilities=tensorrt.sm,
            workspace=tensorrt.workspace_bytes,
            parts=tensorrt.parts,
            version_compatible=tensorrt.version_compatible,
            refit=tensorrt.refit,
            timing_cache=tensorrt.timing_cache,
            release=tensorrt.trt_version,
            skip_memory_check=force,
        )
        with terminal.progress("building", quiet=quiet()) as step:
            engine = build_tensorrt(
                bundle, options, replace=force, on_progress=lambda at: step(at.done, at.total), on_warning=say
            )
    say(f"ready for {backend} in {watch}")
    say(f"next: {PROGRAM} chat {as_argument(bundle)} --image PICTURE")
    click.echo(engine)


@click.command(
    epilog=examples(
        "run bundle --image photo.jpg --prompt 'What is this?'",
        "run bundle --image photo.jpg --raw --prompt 'USER: <image> What is this? ASSISTANT:'",
    )
)
@_bundle
@images_option
@click.option("--prompt", required=True, help="The question; <image> in it says where a picture goes.")
@raw_option
@answering_options
@json_option
def run(bundle: Path, images: tuple[str, ...], prompt: str, raw: bool, as_json: bool, answering: Answering) -> None:
    """Answer one question.

    Standard output gets the answer and nothing else, as it comes.
    """
    from llava_deploy.runtime.terminal_run import Output, Request, Template, run_request

    options = answering.options()
    request = Request(prompt, load_pictures(images), Template.RAW if raw else Template.MODEL)
    run_request(answering.load(bundle), request, options, Output.JSON if as_json else Output.TEXT, say)


@click.command(epilog=examples("chat bundle --image photo.jpg"))
@_bundle
@images_option
@answering_options
def chat(bundle: Path, images: tuple[str, ...], answering: Answering) -> None:
    """Talk about pictures in the terminal.

    Lines that begin with / are commands; /help lists them.
    """
    from llava_deploy.runtime.terminal_chat import Conversation, converse, standard_terminal

    options = answering.options()
    pictures = load_pictures(images)
    llava = answering.load(bundle)
    converse(Conversation(llava, options), standard_terminal(llava.max_len, say), pictures)


@click.command(
    "eval", epilog=examples("eval bundle", "eval fp32 fp16 int4", "eval bundle --data questions.jsonl --json")
)
@click.argument("bundles", type=PATH, nargs=-1, required=True, metavar="BUNDLE [BUNDLE ...]")
@eval_options
def evaluate(bundles: tuple[Path, ...], request: EvalRequest) -> None:
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

    data = request.data
    if data is not None:
        refuse_given("of no effect with --data, whose questions are all asked", "per_kind", "seed")
    shown = Shown.BLANK if request.blank else Shown.PICTURE
    options = EvalOptions(shown, request.batch, request.max_new_tokens)
    questions = drawn_questions(request.per_kind, request.seed) if data is None else read_questions(data)
    exam = Exam(questions, options, chances() if data is None else {})
    output = Output.JSON if request.as_json else Output.TEXT
    examine(bundles, exam, lambda bundle: load_bundle(bundle, request.backend), output)


@click.command(
    epilog=examples(
        "bench bundle", "bench bundle --json before.json", "bench bundle --compare before.json --plot a.png"
    )
)
@_bundle
@bench_options
def bench(bundle: Path, request: BenchRequest) -> None:
    """Measure how fast a bundle answers here.

    Time to the first token and what it is made of, decoding behind contexts of several lengths and for several rows at
    once, memory, and the bandwidth of the memory with the speed that it allows. Everything takes its turn, round by
    round, through the calls that users make; pictures are drawn, and answers go on past the model's stop tokens.
    """
    from llava_deploy.engines.manifest import read_manifest
    from llava_deploy.engines.planner.model import planned_bundle
    from llava_deploy.engines.planner.run import decode_bound

    model = planned_bundle(bundle, read_manifest(bundle))
    run_bench(bundle, request, functools.partial(decode_bound, model))


@click.command(epilog=examples("report bundle -o report.html", "report fp32 fp16 int4 -o a.html --json a.json"))
@click.argument("bundles", type=PATH, nargs=-1, metavar="BUNDLE [BUNDLE ...]")
@report_options
def report(bundles: tuple[Path, ...], request: ReportRequest) -> None:
    """Write a page that answers: should I ship this?

    It holds one or more bundles of one model against each other, the first is what the others are held against: the
    self-test, right answers, agreement token by token, speed beside what the memory allows, memory over time, and
    energy where the board tells it; and it begins with a verdict and its reasons. One file that needs no other.

    The questions are drawn pictures, as eval has them, or those of --data. What cannot be measured is said.
    """
    from llava_deploy.engines.manifest import read_manifest
    from llava_deploy.engines.planner.model import planned_bundle
    from llava_deploy.engines.planner.run import decode_bound
    from llava_deploy.exporter.demo.questions import chances, drawn_questions

    def bound_of(bundle: Path) -> BoundOf:
        return functools.partial(decode_bound, planned_bundle(bundle, read_manifest(bundle)))

    run_report(bundles, request, lambda per_kind: (drawn_questions(per_kind, seed=0), chances()), bound_of)


@click.command(epilog=examples("selftest bundle", "selftest bundle --build --json"))
@_bundle
@selftest_options
def selftest(bundle: Path, request: SelftestRequest) -> None:
    """Say whether a bundle computes here what PyTorch computed.

    Replays the goldens that export or record left in it, without PyTorch: files, pixels, image features, prompt,
    splice, logits, tokens. Fails where a stage leaves its tolerance, and names the first.
    """
    from llava_deploy.engines.default_build import build_default

    run_selftest(bundle, request, build_default)


@click.command(epilog=examples("doctor", "doctor bundle", "doctor bundle --json"))
@click.argument("bundles", type=PATH, nargs=-1, metavar="[BUNDLE ...]")
@json_option
def doctor(bundles: tuple[Path, ...], as_json: bool) -> None:
    """Say what this machine has, and what bundles could do on it.

    System, processor, memory, GPU with its driver, power mode, and what is installed and really loads; which backend
    runs, and what to install for the others. Of a bundle: which engines fit, whether memory does, and what to type
    next.

    Nothing is changed. Fails where nothing can run a bundle, or not every bundle that is named runs as it is.
    """
    from llava_deploy.engines.planner.fits import fits_here

    run_doctor(bundles, fits_here, as_json=as_json)


main.add_command(inspect)
main.add_command(plan)
main.add_command(export)
main.add_command(record)
main.add_command(build)
main.add_command(verify)
main.add_command(run)
main.add_command(chat)
main.add_command(evaluate)
main.add_command(bench)
main.add_command(report)
main.add_command(pack)
main.add_command(unpack)
main.add_command(selftest)
main.add_command(doctor)
main.add_command(swap)
main.add_command(serve)
main.add_command(demo)
main.add_command(completion)
