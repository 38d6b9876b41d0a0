"""The command line: our flags (each room's flags.py), the architecture's as Megatron's, and all early refusals.

What reaches Megatron's parser is, in this order: what the harness always needs, what this machine needs, the
architecture (`--model-variant` or `--hf-config`), the user's flags. The last word wins, so an explicit flag beats
everything else. Importing this file imports neither torch nor megatron.

    python arguments.py FLAGS     check a command line without starting anything (exit code 2 when it is refused)
"""

from __future__ import annotations

import io
import sys
import traceback
import warnings
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from data import DATASET_PROVIDERS, is_own_provider
from data.flags import DEFAULT_PROVIDER
from data.flags import add_flags as add_data_flags
from data.preflight import refusals as data_refusals
from data.processor_files import processor_refusals
from data.text_only import refusals as text_only_refusals
from models import MODEL_REGISTRY, ModelConfig, ModelSpec
from models.expert_flags import takes_grouped_gemm
from models.flags import DEFAULT_ARCH
from models.flags import add_flags as add_model_flags
from runtime import checkpoints, launch_environment
from runtime.flag_table import refused_flags, untested_flags
from runtime.flag_values import value_refusals
from runtime.flags import add_flags as add_runtime_flags
from runtime.machine import Machine, detect
from runtime.megatron_flags import add_megatron_flags
from runtime.preflight import cp_comm_types, refusals, unknown_flags, unknown_name, unusable_sizes
from weights.adapter_check import implied_by_adapter, tuning_refusals
from weights.check import DESCRIPTION, HfSource, described, is_hub_name, is_text_only, local_folder
from weights.flags import add_flags as add_weights_flags
from weights.folder import FolderError, has_processor, read_config, tensor_names
from weights.refusals import checkpoint_refusals, flag_refusals, open_source, other_routers

# What the training loop of this harness is made for; not a matter of taste.
ALWAYS = (
    *("--dataloader-type", "external"),  # data/loader.py
    *("--tokenizer-type", "NullTokenizer"),  # ids come from the processor, the vocabulary from the architecture
    *("--save-interval", "500"),  # Megatron refuses --save without one
    *("--eval-interval", "1000"),  # without one 0.19.2 divides by None
    "--calculate-per-token-loss",
    "--no-rope-fusion",  # the model rotates by itself (interleaved MRoPE)
    "--no-one-logger",
    # Its default keeps all of a step's micro-batches on the device, pixels included, to run a suspect step again.
    *("--rerun-mode", "disabled"),
)
# Accepted so that existing command lines run; the value is what does their job now.
RETIRED = {
    "--use-vanilla-collate-fn": "data/batch.py collates every batch; --use-packed-sequence chooses THD",
    "--total-seq-length": "--seq-length is the number of tokens",
}


class Refused(Exception):
    """The command line can't run as it is: one entry per problem, each naming the flag and the fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(["Refused:", *(f"  - {problem}" for problem in problems)]))
        self.problems = problems


def add_multimodal_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the harness' own flags to Megatron's parser (its `extra_args_provider`)."""
    for add_flags in (add_model_flags, add_data_flags, add_runtime_flags, add_weights_flags):
        add_flags(parser)
    return parser


@dataclass(frozen=True)
class CommandLine:
    """A command line that passed the preflight, and what the preflight found out, for the steps behind it.

    words: the complete one, for Megatron's parser.
    args: the same as the preflight read it, before Megatron's own validation.
    spec: the architecture.
    config: the model, explicit flags included.
    start: which checkpoint `--load` means.
    hf_source: `--load-hf`'s folder, opened; None: there is none, or only its description was fetched.
    notices: what the user should know about flags that were accepted or chosen for them.
    """

    words: list[str]
    args: Namespace
    spec: ModelSpec[Any]
    config: ModelConfig
    start: checkpoints.Start
    hf_source: HfSource | None
    notices: list[str]


def parse(command_line: CommandLine) -> Namespace:
    """Resolve a checked command line and make it Megatron's global state; `runtime.prepare()` comes before it.

    Args:
        command_line: from `preflight_or_exit`.

    Returns:
        Megatron's validated arguments with ours; also what `megatron.training.get_args()` gives from now on.
    """
    with _exit_when_refused():
        args = resolve(command_line)
    from megatron.training.global_vars import set_global_variables

    set_global_variables(args)
    return args


def resolve(command_line: CommandLine) -> Namespace:
    """`parse` without Megatron's global state: callable many times in one process.

    Raises:
        Refused: Megatron's own validation refuses what the preflight accepted.
    """
    if "transformer_engine" not in command_line.words:  # --transformer-impl local: known and chosen
        warnings.filterwarnings(
            "ignore", "(Transformer Engine and )?Apex (are|is) not installed|Only transformer-engine"
        )
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    with _command_line(command_line.words):
        args = parse_args(_extend_megatron_parser)
    # Megatron takes 0 for "no MTP" in some places and for "MTP with no depth" in others.
    args.mtp_num_layers = args.mtp_num_layers or None
    # Megatron has no flag for it, and else leaves what a checkpoint lacks at random values.
    args.strict_fsdp_dtensor_load = True
    with _validated_by_megatron():
        with _without_listing() if args.save else nullcontext():
            validate_args(args)
        # What the layers' configuration asserts, seconds before the model is built from it.
        core_transformer_config_from_args(args)
    if args.rank == 0:
        for notice in command_line.notices:
            print(f"notice: {notice}", file=sys.stderr)
    return args


def preflight(argv: list[str], machine: Machine, world_size: int, *, with_weights: bool = False) -> CommandLine:
    """Check a command line without torch and megatron.

    Every word is parsed once. What the words of each origin say is laid over what those before it say, in the order in
    which Megatron's parser will read them.

    Args:
        argv: the user's flags.
        machine: what is installed here.
        world_size: ranks of the whole job.
        with_weights: fetch the weights of a hub name of `--load-hf`, not only what describes them.

    Raises:
        Refused: it can't run.
    """
    given = _read(argv)
    try:
        from_adapter = implied_by_adapter(given)
    except FolderError as error:
        raise Refused([str(error)]) from error
    argv, given = [*from_adapter, *argv], _read(from_adapter) | given
    weights_are_here = with_weights or "load_hf" not in given or not is_hub_name(given["load_hf"])
    implied = _implied_by_hf_folder(given, with_weights)
    spec, base, chosen = _architecture({**implied, **given})
    if (names := _names_in_folder({**implied, **given})) is not None and spec.hf_weights is not None:
        base, _ = spec.hf_weights.as_stored(base, names)
    name = given.get("dataset_provider", DEFAULT_PROVIDER)
    if name not in DATASET_PROVIDERS and not is_own_provider(name):
        raise Refused([unknown_name("--dataset-provider", name, DATASET_PROVIDERS)])
    # One of the user's own isn't imported here: it may need torch.
    needs_processor = name in DATASET_PROVIDERS and DATASET_PROVIDERS[name].needs_processor
    architecture = base.to_flags()
    if given.get("num_experts") == 0:
        architecture = without_experts(architecture)
    resolved = [*chosen, *_as_words(implied)]
    if is_text_only(base.to_hf()) and not given.get("language_model_only"):
        resolved.append("--language-model-only")
    args = _laid_over(_read(ALWAYS), _read(architecture), given, _read(resolved))
    if problems := unusable_sizes(args):
        raise Refused(problems)
    for_machine = machine_flags(args, machine)
    args = _laid_over(vars(args), _read(for_machine), given, _read(resolved))
    words = [*ALWAYS, *for_machine, *architecture, *argv, *resolved]

    try:
        config = base.with_flags(args)
    except ValueError as error:
        raise Refused([str(error)]) from error
    start = checkpoints.Start()
    if args.load:
        start = checkpoints.choose(Path(args.load), args.ckpt_step, args.ckpt_format)
        words += [] if start.step is None else ["--ckpt-step", str(start.step)]
    if args.language_model_only and not is_text_only(config.to_hf()):
        raise Refused([f"--language-model-only: {args.model_arch} isn't built without its vision encoder"])
    problems = [
        *refused_flags(argv),
        *value_refusals(args, given),
        *refusals(args, given, start, machine, world_size),
        *spec.check_layout(args, config),
        *processor_refusals(args, config.to_hf() if needs_processor else None),
        *data_refusals(args),
        *text_only_refusals(args, given),
        *flag_refusals(args, spec),
        *checkpoint_refusals(args, spec, config, start),
        *tuning_refusals(args, given, spec, config, start),
    ]
    source = None
    if args.load_hf is not None and spec.hf_weights is not None:
        source, found = open_source(
            Path(args.load_hf),
            spec,
            spec.hf_weights,
            config,
            language_model_only=args.language_model_only,
            weights_are_here=weights_are_here,
        )
        problems += found
    if problems:
        raise Refused(problems)
    return CommandLine(words, args, spec, config, start, source, notices(args, argv, start))


def preflight_or_exit(argv: list[str], *, with_weights: bool = False) -> CommandLine:
    """`preflight` for this machine and the environment's WORLD_SIZE; prints refusals and exits with code 2.

    Imports neither torch nor megatron, so that it comes before both: a refusal is there within a second.
    """
    if "-h" in argv or "--help" in argv:
        _print_help()
        raise SystemExit(0)
    with _exit_when_refused():
        try:
            world_size = launch_environment.world_size()
        except ValueError as error:
            raise Refused([str(error)]) from error
        return preflight(argv, detect(), world_size, with_weights=with_weights)


def machine_flags(args: Namespace, machine: Machine) -> list[str]:
    """What this machine needs or runs best, given the architecture and the layout."""
    impl = args.transformer_impl or ("transformer_engine" if machine.gpus and machine.transformer_engine else "local")
    flags = ["--transformer-impl", impl]
    if args.use_megatron_fsdp:
        # As DDP does; by default Megatron-FSDP adds up a 16-bit model's gradients in 16 bits.
        flags += ["--megatron-fsdp-main-grads-dtype", "fp32"]
    else:
        # A checkpoint loads in any layout. Megatron's default can't even save a bf16 model's fp32 parameters (A_log).
        flags.append("--dist-ckpt-optim-fully-reshardable")
    if impl == "local":
        flags.append("--no-persist-layer-norm")  # a kernel that torch's norms haven't
    if not (machine.gpus and machine.fused_weight_gradients):
        flags.append("--no-gradient-accumulation-fusion")
    args = Namespace(**{**vars(args), "transformer_impl": impl})
    if args.num_experts:
        if not args.no_moe_grouped_gemm and takes_grouped_gemm(args, on_gpu=machine.gpus > 0):
            flags.append("--moe-grouped-gemm")
        if machine.gpus and impl == "transformer_engine" and not args.no_moe_fusion:
            flags += ["--moe-permute-fusion", "--moe-router-fusion"]
    if args.async_save:
        # Megatron needs the first for it, and the second where nvidia-resiliency-ext isn't installed.
        flags += ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    if args.context_parallel_size > 1 and args.cp_comm_type is None:
        flags += ["--cp-comm-type", cp_comm_types(args)[0]]
    return flags


def without_experts(flags: list[str]) -> list[str]:
    """Drop the experts of an architecture's flags (`--num-experts 0`): a dense FFN of `--ffn-hidden-size` is left."""
    kept, dropping = [], False
    for word in flags:
        if word.startswith("--"):
            dropping = word == "--num-experts" or word.startswith("--moe-")
        if not dropping:
            kept.append(word)
    return kept


def notices(args: Namespace, argv: list[str], start: checkpoints.Start) -> list[str]:
    """What the user should know about flags that were accepted or chosen for them."""
    given = {word.split("=", 1)[0] for word in argv}
    found = [f"{flag} has no effect here: {instead}" for flag, instead in RETIRED.items() if flag in given]
    if untested := untested_flags(argv):
        found.append(f"{', '.join(untested)}: not tested here; Megatron gets what you gave (docs/flags.md)")
    if routers := other_routers(args):
        found.append(f"{', '.join(routers)}: transformers routes tokens otherwise, so an export would answer otherwise")
    if args.context_parallel_size > 1 and "--cp-comm-type" not in given:
        kind = args.cp_comm_type[0]
        why = "heads divide by CP" if kind == "a2a" else "heads don't divide by CP, so no a2a"
        found.append(f"--cp-comm-type {kind} ({why})")
    return [*found, *start.warnings]


def _implied_by_hf_folder(given: Mapping[str, Any], with_weights: bool) -> dict[str, str]:
    """What `--load-hf` implies: the architecture and the processor are the folder's unless flags name others.

    Returns:
        Values by destination; a hub name of `--load-hf` is replaced by its local folder.
    """
    if given.get("load_hf") is None:
        return {}
    try:
        folder = local_folder(given["load_hf"]) if with_weights else local_folder(given["load_hf"], DESCRIPTION)
        text_only = is_text_only(read_config(folder)) or given.get("language_model_only", False)
    except FolderError as error:
        raise Refused([f"--load-hf {error}"]) from error
    implied = {"load_hf": str(folder)}
    if "hf_config" not in given and "model_variant" not in given:
        implied["hf_config"] = str(folder)
    if "hf_processor_path" not in given and has_processor(folder, text_only=text_only):
        implied["hf_processor_path"] = str(folder)
    return implied


def _names_in_folder(given: Mapping[str, Any]) -> set[str] | None:
    """Tensors of the folder that the model's weights or numbers come from; None: there is none, or it isn't here."""
    folder = given.get("load_hf") or given.get("hf_config")
    return None if folder is None or not Path(folder).is_dir() else tensor_names(Path(folder))


def _architecture(given: Mapping[str, Any]) -> tuple[ModelSpec[Any], ModelConfig, list[str]]:
    """The architecture, the model that a variant or a folder names, and the words that name it."""
    arch = given.get("model_arch", DEFAULT_ARCH)
    if arch not in MODEL_REGISTRY:
        raise Refused([unknown_name("--model-arch", arch, MODEL_REGISTRY)])
    spec = MODEL_REGISTRY[arch]
    variant, folder = given.get("model_variant"), given.get("hf_config")
    if folder is not None:
        if variant is not None:
            raise Refused(["--hf-config and --model-variant both name an architecture; give one"])
        try:
            return spec, described(spec, read_config(Path(folder)), Path(folder)), ["--model-arch", arch]
        except FolderError as error:
            raise Refused([f"--hf-config {error}"]) from error
    variant = variant or next(iter(spec.variants))
    if variant not in spec.variants:
        raise Refused([unknown_name("--model-variant", variant, spec.variants)])
    return spec, spec.variants[variant], ["--model-arch", arch, "--model-variant", variant]


class _LightParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused([message])


@cache
def _light_parser() -> tuple[_LightParser, dict[str, Any]]:
    """A parser of all flags that gives only what words say, and all flags' defaults."""
    parser = _LightParser(allow_abbrev=False, add_help=False)
    add_megatron_flags(parser)
    add_multimodal_args(parser)
    defaults: dict[str, Any] = {}
    for action in parser._actions:
        defaults.setdefault(action.dest, action.default)
        action.default = SUPPRESS
    # `machine_flags` chooses where the user doesn't.
    return parser, defaults | {"transformer_impl": None, "cp_comm_type": None}


def _read(words: Iterable[str]) -> dict[str, Any]:
    """What flags say, by destination; nothing about flags that aren't among the words.

    Raises:
        Refused: flags that don't exist, values of another type.
    """
    words = list(words)
    parser, _ = _light_parser()
    if problems := unknown_flags(words, parser._option_string_actions):
        raise Refused(problems)
    return vars(parser.parse_args(words))


def _laid_over(*layers: Mapping[str, Any]) -> Namespace:
    """A complete command line's arguments: defaults, and over them each layer in turn."""
    merged = dict(_light_parser()[1])
    for layer in layers:
        merged |= layer
    return Namespace(**merged)


def _as_words(values: Mapping[str, str]) -> list[str]:
    return [word for dest, value in values.items() for word in (f"--{dest.replace('_', '-')}", value)]


def _extend_megatron_parser(parser: ArgumentParser) -> ArgumentParser:
    def error(message: str) -> NoReturn:
        """Without Megatron's usage text, which has hundreds of lines."""
        print(Refused([message]), file=sys.stderr, flush=True)
        raise SystemExit(2)

    parser.error = error  # type: ignore[method-assign]  # Megatron makes the parser, so there is no subclass
    return add_multimodal_args(parser)


@contextmanager
def _command_line(argv: list[str]) -> Iterator[None]:
    """Megatron's `parse_args` reads `sys.argv` only."""
    saved = sys.argv
    sys.argv = [saved[0], *argv]
    try:
        yield
    finally:
        sys.argv = saved


@contextmanager
def _exit_when_refused() -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        print(refused, file=sys.stderr, flush=True)
        raise SystemExit(2) from None


@contextmanager
def _validated_by_megatron() -> Iterator[None]:
    """What Megatron asserts becomes a refusal; an assertion without words is quoted."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise Refused(
            [f"Megatron's validation ({Path(where.filename).name}:{where.lineno}): {error or where.line}"]
        ) from error


@contextmanager
def _without_listing() -> Iterator[None]:
    """Megatron prints all of its 800 arguments; they are in `--save`'s arguments.json, and the log stays readable."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write(printed.getvalue().partition("-" * 24 + " arguments ")[0])


def _print_help() -> None:
    parser = ArgumentParser(
        prog="pretrain_multimodal.py",
        usage="pretrain_multimodal.py [our flags] [Megatron flags]",
        description="The harness' own flags. docs/flags.md says what each flag of Megatron-LM's does here.",
        add_help=False,
    )
    add_multimodal_args(parser)
    parser.print_help()


if __name__ == "__main__":
    preflight_or_exit(sys.argv[1:])
