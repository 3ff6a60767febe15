"""torch's nn.MultiheadAttention, which holds three projections in one parameter and reads all weights by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..shards import Params
from .form import Form, Joins, Views, linear, nothing_to_undo

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class InLayers:
    """Stands for a parameter whose rows are in layers now. No operation takes it.

    torch's encoder looks at the attention's parameters before it takes the fast path, on which it would read weights
    past their layers. It leaves that path where one of them is no plain tensor.
    """

    # transformers would give it random values
    _is_hf_initialized = True

    @property
    def data(self) -> InLayers:
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        used = getattr(func, "__name__", func)
        raise TypeError(f"in_proj_weight: expected a use of the layers {', '.join(PROJECTIONS)}, got {used}")


class SplitAttention(nn.Module):
    """nn.MultiheadAttention with a layer for each projection: ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Called as that is, with the same result up to the rounding of the products. Without ``bias_k``, ``bias_v`` and
    ``add_zero_attn``.
    """

    # torch's encoder asks for it before it reads weights past their layers
    _qkv_same_embed_dim = False

    def __init__(self, built: nn.MultiheadAttention, layers: dict[str, nn.Linear]):
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = built.embed_dim, built.kdim, built.vdim
        self.num_heads, self.head_dim = built.num_heads, built.head_dim
        self.dropout, self.batch_first = built.dropout, built.batch_first
        self.in_proj_weight = self.in_proj_bias = InLayers()
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: shapes, masks and what is returned.

        Raises:
            ValueError: if ``is_causal`` is set without an ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected the causal mask where is_causal is set, got None")
        batched = query.dim() == 3
        query, key, value = self._batch_first(query, key, value, batched)
        q = self._heads(self.q_proj(query))
        k, v = self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask, dropout = self._bias(attn_mask, key_padding_mask, q), self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = functional.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            weights = None
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _batch_first(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> list[Tensor]:
        # one tensor in three places stays one: layers with the same input share its Gram matrix
        found: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in found:
                found[id(x)] = x[None] if not batched else x if self.batch_first else x.transpose(0, 1)
        return [found[id(x)] for x in (query, key, value)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _bias(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores [batch, heads, queries, keys]; minus infinity where a mask hides a key."""

        def additive(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask.to(q.dtype)
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)

        bias = None if attn_mask is None else additive(attn_mask)
        if bias is not None and bias.dim() == 3:
            bias = bias.unflatten(0, (len(q), self.num_heads))
        if key_padding_mask is None:
            return bias
        padding = additive(key_padding_mask).view(len(q), 1, 1, -1)
        return padding if bias is None else bias + padding


class AttentionForm(Form):
    """The module takes the place of the attention; layers share the memory of its parameters."""

    def is_built(self, module: nn.Module) -> bool:
        return type(module) is nn.MultiheadAttention

    def reason_against(self, module: nn.Module, params: Params) -> str | None:
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "nn.MultiheadAttention with bias_k, bias_v or add_zero_attn"
        if type(module.out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
            return f"nn.MultiheadAttention with {type(module.out_proj).__name__} as out_proj"
        return None

    def matrices(self, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
        # its out_proj is a layer
        names = ["in_proj_weight"] if module._qkv_same_embed_dim else [f"{name}_weight" for name in PROJECTIONS]
        return {name: partial(getattr, module, name) for name in names}

    def take_apart(self, module: nn.Module, views: Views):
        layers = {}
        for index, name in enumerate(PROJECTIONS):
            rows = slice(index * module.embed_dim, (index + 1) * module.embed_dim)
            if module._qkv_same_embed_dim:
                weight = views.of(module.in_proj_weight, name, lambda whole, rows=rows: whole[rows])
            else:
                weight = getattr(module, f"{name}_weight")
            bias = module.in_proj_bias
            bias = None if bias is None else views.of(bias, name, lambda whole, rows=rows: whole[rows])
            layers[name] = linear(weight, bias, module.training)
        layers["out_proj"] = linear(module.out_proj.weight, module.out_proj.bias, module.training)
        return SplitAttention(module, layers).train(module.training), nothing_to_undo

    def parts(self, module: nn.Module) -> list[nn.Module] | None:
        return list(module.children()) if isinstance(module, SplitAttention) else None

    def put_together(self, module: nn.Module, joins: Joins) -> nn.Module:
        layers = [getattr(module, name) for name in PROJECTIONS]
        sizes = {"kdim": module.kdim, "vdim": module.vdim, "batch_first": module.batch_first}
        bias = layers[0].bias is not None
        built = nn.MultiheadAttention(
            module.embed_dim, module.num_heads, module.dropout, bias=bias, device="meta", **sizes
        )
        if built._qkv_same_embed_dim:
            built.in_proj_weight = joins.of([layer.weight for layer in layers], torch.cat)
        else:
            for name, layer in zip(PROJECTIONS, layers, strict=True):
                setattr(built, f"{name}_weight", layer.weight)
        if bias:
            built.in_proj_bias = joins.of([layer.bias for layer in layers], torch.cat)
        built.out_proj.weight, built.out_proj.bias = module.out_proj.weight, module.out_proj.bias
        return built.train(module.training)
