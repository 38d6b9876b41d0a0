"""Train a vision-language model: arguments -> registry -> megatron.training.pretrain().

Knows no architecture: everything that depends on `--model-arch` comes from its `ModelSpec`.
Run it with torchrun, or through scripts/run_qwen35_vl.sh.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arguments
from models import ModelConfig, ModelSpec
from models.adapters import adapters_of_args, trained_of_args
from models.trained import freeze, trains_in_front
from runtime import lifetime, prepare, quiet_libraries

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from models.base import MultimodalModel


def model_provider(
    spec: ModelSpec[Any],
    architecture: ModelConfig,
    args: Namespace,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> MultimodalModel:
    """Build this rank's pipeline stage; called by `megatron.training.get_model`."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import core_transformer_config_from_args

    from runtime import first_step
    from runtime.meta import build_on_meta

    language_config = config or core_transformer_config_from_args(args)
    # Pipeline stages tell each other how long a packed row is; Megatron has no flag for it.
    language_config.variable_seq_lengths = args.use_packed_sequence and args.pipeline_model_parallel_size > 1
    # Here, since the rank's device is set by now.
    first_step.announce_check(args.transformer_impl != "local" and not args.deterministic_mode)
    spec.check_kernels(args, architecture)
    build = partial(
        spec.build_model,
        args,
        architecture,
        language_config,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
    )
    model = build_on_meta(build) if args.init_model_with_meta_device else build()
    choose_trained(spec, architecture, args, model)
    return model


def choose_trained(spec: ModelSpec[Any], config: ModelConfig, args: Namespace, model: MultimodalModel) -> None:
    """`--freeze`, or LoRA's adapters beside a frozen model; before Megatron wraps it."""
    if args.freeze is None and args.lora_rank is None:
        return
    weights = spec.table
    what = trained_of_args(args, spec, config)
    freeze(weights.parameters(config, model), what.frozen)
    if (adapters := adapters_of_args(args, spec, config)) is not None:
        from models.common.lora import attach

        # By identity: experts in one tensor are several canonical parameters.
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        attach(model, adapters, {name: own[id(parameter)] for name, parameter in weights.parameters(config, model)})
        model.adapters_only = True
    first = min((layer.layer_number - 1 for layer in model.language_model.decoder.layers), default=args.num_layers)
    model.trains_in_front = trains_in_front(what, weights.mapping(config, ()).sources, first)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; `argv` defaults to `sys.argv[1:]`."""
    lifetime.end_with_agent()
    # Early, since a refusal shouldn't cost the import of torch and megatron.
    command_line = arguments.preflight_or_exit(sys.argv[1:] if argv is None else argv, with_weights=True)
    quiet_libraries()
    prepared = prepare()
    args = arguments.parse(command_line)
    spec, config = command_line.spec, command_line.config
    source = command_line.hf_source

    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from torch.distributed.elastic.multiprocessing.errors import record

    from data import find_provider
    from data.loader import dataset_provider
    from data.processor import generation_settings
    from forward_step import ForwardStep
    from runtime import checkpoints, output_folder, preemption, time_split
    from runtime.learning_rates import LearningRates
    from runtime.model_builder import ProvidedModelConfig
    from runtime.not_finite import no_silent_end
    from runtime.outputs import draw_losses, write_arguments
    from runtime.profile_ranges import ProfileRanges
    from weights.adapter_job import load_adapter, record_base, save_adapter
    from weights.job import HfExporter, load_hf
    from weights.origin import HfOrigin, RunInputs, RunProcessor, write_hf_folder

    preemption.install(args)
    time_split.install(args)
    if args.rank == 0:
        output_folder.begin(args)
    processor = find_provider(args.dataset_provider).processor(args, config.to_hf())
    run_processor = None if processor is None else RunProcessor(processor, generation_settings(processor))
    origin = HfOrigin.of(args, source)
    inputs = RunInputs.of(args)
    if args.rank == 0 and args.save:
        write_arguments(args, prepared, Path(args.save) / "arguments.json")
        hf = Path(args.save) / "hf"
        write_hf_folder(hf, config.to_hf(), run_processor, origin, with_record=True, inputs=inputs)
    exporter = HfExporter(
        args,
        spec,
        config,
        origin.record,
        lambda folder: write_hf_folder(folder, config.to_hf(), run_processor, origin, with_record=False, inputs=inputs),
    )
    model = ProvidedModelConfig(
        provider=partial(model_provider, spec, config, args),
        post_wrap_hooks=[
            partial(load_hf, args, spec, config, source),
            partial(load_adapter, args, spec, config),
            partial(record_base, args, spec, config, source),
            exporter.attach,
            LearningRates(args, spec, config).attach,
            ProfileRanges(args).attach,
        ],
    )

    if args.rank == 0 and args.load:
        checkpoints.repair_tracker(Path(args.load), args.ckpt_format)

    # Plain python, without torchrun's rendezvous: one rank needs no port.
    store = None if "MASTER_ADDR" in os.environ else torch.distributed.HashStore()
    bad_batches = None if args.dump_bad_batch is None else Path(args.dump_bad_batch)
    forward_step = ForwardStep(bad_batches, cuda_graphs=args.cuda_graphs)

    @record  # torchrun's last words are then the traceback of the rank that failed first
    @no_silent_end(exporter.chunks)
    @forward_step.failure_explained()
    @checkpoints.schedule_explained()
    def train() -> bool:
        """Whether training went to its end; None from `record` when it was left early, with exit code 0."""
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            dataset_provider(args, spec.model_inputs(config, trained_of_args(args, spec, config)), processor),
            ModelType.encoder_or_decoder,
            forward_step,
            store=store,
        )
        return True

    if train():
        exporter.finish()
        if args.save_adapter is not None:
            save_adapter(exporter)
    torch.distributed.destroy_process_group()
    if args.rank == 0 and args.tensorboard_dir:
        draw_losses(Path(args.tensorboard_dir), Path(args.tensorboard_dir).parent / "loss.png")


if __name__ == "__main__":
    main()
