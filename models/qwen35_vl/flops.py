"""Floating-point operations of one Qwen3.5-VL micro-batch, forward and backward, of what a run computes.

A multiply-add counts as two. A product with a weight is computed once forward, once for its input's gradient where
something in front of it is trained, and once for the weight's where that is trained; attention and the delta rule cost
twice as much backward as forward. Recomputation isn't counted, so the figure is the model's, not the hardware's.
Decoder, GatedDeltaNet, ViT, MTP and output layer are in; norms, rotary and softmax are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from models.qwen35_vl.configuration import Qwen35VLConfig
from models.qwen35_vl.hf_weights import EMBEDDING, OUTPUT, weight_map
from models.spec import BatchShape
from models.trained import EVERYTHING, Trained

MULTIPLY_ADD = 2
# What an operation is done for, and so multiplied by.
TOKEN, PAIR, PATCH, PATCH_PAIR, FEATURE, LABEL, MTP_LABEL = range(7)
DECODER, MTP, VISION = "language_model.decoder.", "language_model.mtp.layers.0.", "vision_model."


@dataclass(frozen=True)
class Product:
    """Multiply-adds of one step of the forward pass.

    weight: canonical name of the parameter that is multiplied by, None where two activations are multiplied.
    macs: 0 for a parameter that only matters to what is upstream of others.
    times: weights of this shape that each of these is multiplied by (a token's experts); `macs` is of all of them.
    per: TOKEN, PAIR (a token and one that it attends to), PATCH, PATCH_PAIR, FEATURE, LABEL (a token whose next one is
        trained) or MTP_LABEL (the same of MTP, over its depths).
    """

    weight: str | None
    macs: int
    per: int = TOKEN
    times: int = 1


@dataclass(frozen=True)
class FlopCount:
    """What a run computes.

    macs: multiply-adds, forward and backward, for each of what a product is done for, TOKEN to MTP_LABEL.
    patches_per_feature: that the merger puts together.
    """

    macs: tuple[int, ...]
    patches_per_feature: int

    @classmethod
    def of(cls, config: Qwen35VLConfig, what: Trained = EVERYTHING) -> FlopCount:
        """For a run that trains this."""
        trained = set() if what.adapters else weight_map(config).sources.keys() - what.frozen
        counter = _Counter(trained, what.adapters)
        vision = not config.language_model_only and counter.walk(_vision(config), upstream=False)
        embedded = vision or EMBEDDING in trained
        hidden = counter.walk(_decoder(config), embedded)
        output, macs = EMBEDDING if config.tie_word_embeddings else OUTPUT, config.hidden_size * config.vocab_size
        counter.walk([Product(output, macs, LABEL)], hidden)
        if config.mtp_num_layers:
            predicted = counter.walk(_mtp(config), hidden or EMBEDDING in trained)
            counter.walk([Product(output, macs, MTP_LABEL)], predicted)
        return cls(tuple(counter.macs), config.vision.spatial_merge_size**2)

    def of_batch(self, shape: BatchShape) -> float:
        """FLOPs of a micro-batch, over all ranks that share it."""
        frames = shape.grid_thw[:, 0]
        per_frame = shape.grid_thw[:, 1] * shape.grid_thw[:, 2]
        patches = int((frames * per_frame).sum())
        tokens = sum(shape.document_lengths)
        amounts = (
            tokens,
            sum(length * (length + 1) // 2 for length in shape.document_lengths),  # causal
            patches,
            int((frames * per_frame**2).sum()),  # every patch of a frame sees every other
            patches // self.patches_per_feature,
            shape.trained[0] if shape.trained else tokens,
            sum(shape.trained[1:]) if shape.trained else tokens,
        )
        return float(MULTIPLY_ADD * sum(macs * amount for macs, amount in zip(self.macs, amounts, strict=True)))


class _Counter:
    """Adds up products in the order in which the forward pass computes them."""

    def __init__(self, trained: Set[str], adapters: Mapping[str, tuple[int, int]]) -> None:
        self.macs = [0] * 7
        self._trained = trained
        self._adapters = adapters

    def walk(self, products: Iterable[Product], upstream: bool) -> bool:
        """Count products that follow one another.

        Args:
            upstream: something is trained that the first one's input depends on.

        Returns:
            The same of the last one's output.
        """
        for product in products:
            if product.weight is None:
                times = 1 + 2 * upstream
            else:
                trains = product.weight in self._trained
                times = 1 + upstream + trains
                upstream |= trains
            self.macs[product.per] += times * product.macs
            if product.weight is not None and product.weight in self._adapters:
                a, b = self._adapters[product.weight]
                self.macs[product.per] += product.times * ((2 + upstream) * a + 3 * b)
                upstream = True
        return upstream


def _decoder(config: Qwen35VLConfig) -> Iterator[Product]:
    for i in range(config.num_layers):
        full_attention = (i + 1) % config.full_attention_interval == 0
        yield from _layer(config, f"{DECODER}layers.{i}.", full_attention)
    yield Product(f"{DECODER}final_layernorm.weight", 0)


def _mtp(config: Qwen35VLConfig) -> Iterator[Product]:
    yield Product(f"{MTP}enorm.weight", 0)
    yield Product(f"{MTP}hnorm.weight", 0)
    yield Product(f"{MTP}eh_proj.weight", 2 * config.hidden_size**2)  # [embedding, hidden] -> hidden
    yield from _layer(config, f"{MTP}mtp_model_layer.", True)
    yield Product(f"{MTP}final_layernorm.weight", 0)


def _layer(config: Qwen35VLConfig, layer: str, full_attention: bool) -> Iterator[Product]:
    yield Product(f"{layer}input_layernorm.weight", 0)
    yield from _attention(config, layer) if full_attention else _gated_delta_net(config, layer)
    yield Product(f"{layer}pre_mlp_layernorm.weight", 0)
    mlp = f"{layer}mlp."
    experts = config.experts
    if experts is None:
        yield from _gated_mlp(mlp, config.hidden_size, config.dense_ffn_hidden_size)
        return
    yield Product(f"{mlp}router.weight", config.hidden_size * experts.count)
    # One stands for all.
    yield from _gated_mlp(f"{mlp}experts.0.", config.hidden_size, experts.ffn_hidden_size, experts.topk)
    yield from _gated_mlp(f"{mlp}shared_experts.", config.hidden_size, experts.shared_ffn_hidden_size)
    yield Product(f"{mlp}shared_experts.gate_weight", config.hidden_size)


def _gated_mlp(mlp: str, hidden: int, ffn: int, times: int = 1) -> Iterator[Product]:
    yield Product(f"{mlp}linear_fc1.weight", times * 2 * hidden * ffn, times=times)
    yield Product(f"{mlp}linear_fc2.weight", times * hidden * ffn, times=times)


def _attention(config: Qwen35VLConfig, layer: str) -> Iterator[Product]:
    """Queries and their gates count per query head; keys and values per group."""
    attention, width = f"{layer}self_attention.", config.num_attention_heads * config.kv_channels
    groups = config.num_query_groups * config.kv_channels
    yield Product(f"{attention}linear_qkv.weight", config.hidden_size * (2 * width + 2 * groups))
    yield Product(f"{attention}q_layernorm.weight", 0)
    yield Product(f"{attention}k_layernorm.weight", 0)
    yield Product(None, 2 * width, PAIR)
    yield Product(f"{attention}linear_proj.weight", config.hidden_size * width)


def _gated_delta_net(config: Qwen35VLConfig, layer: str) -> Iterator[Product]:
    mixer, heads = f"{layer}self_attention.", config.linear_num_value_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    yield Product(f"{mixer}in_proj.weight", config.hidden_size * (2 * keys + 2 * values + 2 * heads))
    yield Product(f"{mixer}conv1d.weight", config.linear_conv_kernel_dim * (2 * keys + values))
    yield Product(f"{mixer}A_log", 0)
    yield Product(f"{mixer}dt_bias", 0)
    # The recurrence itself, per value head: read by key, write, read by query. A chunked kernel does more.
    yield Product(None, 3 * heads * config.linear_key_head_dim * config.linear_value_head_dim)
    yield Product(f"{mixer}out_norm.weight", 0)
    yield Product(f"{mixer}out_proj.weight", config.hidden_size * values)


def _vision(config: Qwen35VLConfig) -> Iterator[Product]:
    vision = config.vision
    width, ffn = vision.hidden_size, vision.ffn_hidden_size
    merged = width * vision.spatial_merge_size**2
    yield Product(f"{VISION}patch_embed.weight", vision.patch_dim * width, PATCH)
    yield Product(f"{VISION}patch_embed.bias", 0)
    yield Product(f"{VISION}pos_embed.weight", 0)
    for i in range(vision.num_layers):
        for module, macs in (
            ("input_layernorm", 0),
            ("self_attention.linear_qkv", 3 * width**2),
            (None, 2 * width),
            ("self_attention.linear_proj", width**2),
            ("pre_mlp_layernorm", 0),
            ("mlp.linear_fc1", width * ffn),
            ("mlp.linear_fc2", width * ffn),
        ):
            if module is None:
                yield Product(None, macs, PATCH_PAIR)
                continue
            yield Product(f"{VISION}decoder.layers.{i}.{module}.weight", macs, PATCH)
            yield Product(f"{VISION}decoder.layers.{i}.{module}.bias", 0, PATCH)
    yield Product(f"{VISION}merger.norm.weight", 0)
    yield Product(f"{VISION}merger.norm.bias", 0)
    yield Product(f"{VISION}merger.linear_fc1.weight", merged**2, FEATURE)
    yield Product(f"{VISION}merger.linear_fc1.bias", 0)
    yield Product(f"{VISION}merger.linear_fc2.weight", merged * config.hidden_size, FEATURE)
    yield Product(f"{VISION}merger.linear_fc2.bias", 0)
