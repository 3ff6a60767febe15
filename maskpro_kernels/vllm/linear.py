"""Products of vLLM's linear layers with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from .. import ops
from ..functional.checks import describe
from ..ops.pattern import NMPattern
from ..packed import INT4, INTEGER_KINDS, KEEP, PackedNM

COPY_AGAIN = "copy or download the checkpoint again"
# Places of the parts of attention's fused layer
PLACES = {"q": 0, "k": 1, "v": 2}
DTYPES = {kind: dtype for dtype, kind in INTEGER_KINDS.items()}


class Storage(NamedTuple):
    """How the checkpoint stores a layer: its name in the config, pattern, kind of values, and values of a scale."""

    name: str
    pattern: NMPattern
    values: str
    group: int

    @property
    def kind(self) -> tuple:
        """What layers of one product have in common."""
        return self[1:]

    def tensors(self, k: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """(columns, dtype) of each tensor of a weight with ``k`` columns in a model of ``dtype``."""
        count = k // self.pattern.m * self.pattern.n
        bitmask = -(-k // 8), torch.uint8
        if self.values == KEEP:
            return {"values": (count, dtype), "bitmask": bitmask}
        values = count // 2 if self.values == INT4 else count, DTYPES[self.values]
        return {"values": values, "bitmask": bitmask, "scales": (-(-count // self.group), dtype)}

    def check_cut(self, k: int, of: int) -> None:
        """Raise ValueError if a rank's ``k`` columns end within a group, a byte of the bitmask or a block of scales."""
        if not self._cuts(k, of):
            sizes = [size for size in range(1, of + 1) if of % size == 0 and self._cuts(of // size, of)]
            scaled = "" if self.values == KEEP else f" or {self.group} kept values with one scale"
            raise ValueError(
                f"tensor_parallel_size: expected one of {', '.join(map(str, sizes))} for the {of} columns of "
                f"{self.name}, got {of // k}: a byte of the bitmask{scaled} would be on two ranks"
            )

    def _cuts(self, k: int, of: int) -> bool:
        count = k // self.pattern.m * self.pattern.n
        return k == of or (k % max(self.pattern.m, 8) == 0 and (self.values == KEEP or count % self.group == 0))

    def checked(self, tensors: dict[str, Tensor]) -> PackedNM:
        """Pack loaded tensors; ValueError, with the sentence of transformers' loader, if they are damaged."""
        try:
            return PackedNM(**tensors, pattern=self.pattern).check()
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint: {self.name}.{error}") from error

    def check_loaded(self, name: str, loaded: Tensor, columns: int, dtype: torch.dtype) -> None:
        """Raise ValueError unless a tensor of the file has these columns, and a dtype that converts to this one."""
        same = loaded.dtype.is_floating_point if dtype.is_floating_point else loaded.dtype == dtype
        if not same or loaded.dim() != 2 or loaded.shape[1] != columns:
            raise ValueError(
                f"checkpoint: {self.name}.{name}: expected {columns} columns of {dtype}, got {describe(loaded)}; "
                f"{COPY_AGAIN}"
            )


class Product(NamedTuple):
    """A product of a layer: its rows, and the names of its tensors in vLLM's layer.

    Attributes:
        storage: of the rows in the checkpoint; None for dense ones.
        start, end: rows of the result.
        names: name in the layer by name in the checkpoint.
    """

    storage: Storage | None
    start: int
    end: int
    names: dict[str, str]


class PackedLinearMethod(LinearMethodBase):
    """Method of a layer with packed parts.

    Values, bitmask and scales are matrices with the rows of the weight, so vLLM's loaders cut them like weights, by
    rows or columns. Parts of one kind share their tensors and a product. Otherwise each part has its own: vLLM's loader
    then writes the part into a matrix of all rows, from which its rows are copied.

    Args:
        prefix: name of the layer in vLLM's model.
        parts: storage of each part in the checkpoint, None for a dense one.
    """

    def __init__(self, prefix: str, parts: Sequence[Storage | None]):
        self.prefix = prefix
        self.parts = list(parts)
        self.alike = len({part and part.kind for part in self.parts}) == 1
        self.products: list[Product] = []
        # names of tensors, each with the place of a part that was loaded
        self.loaded: set[tuple[str, int]] = set()

    def create_weights(self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
                       input_size: int, output_size: int, params_dtype: torch.dtype,
                       weight_loader: Callable, **attributes) -> None:  # fmt: skip
        k = input_size_per_partition
        for part in self.parts:
            if part is not None:
                part.check_cut(k, input_size)
        if not self.alike and len(self.parts) != len(output_partition_sizes):
            raise ValueError(
                f"quantization_config: expected layers of one kind in {self.prefix} of vLLM's model, got "
                f"{', '.join('dense' if x is None else f'{x.pattern} {x.values}' for x in self.parts)}"
            )
        self.k = input_size
        self.sizes = list(output_partition_sizes)
        rows = sum(self.sizes)
        ends = list(accumulate(self.sizes))
        # the loader of the tensors' names in the checkpoint; "weight" also stops loaders that do not know this format
        placeholders = {"weight"}
        for place, part in enumerate(self.parts[:1] if self.alike else self.parts):
            start = 0 if self.alike else ends[place] - self.sizes[place]
            end = rows if self.alike else ends[place]
            names = {}
            for name, (columns, dtype) in _tensors(part, k, params_dtype).items():
                names[name] = name if self.alike else f"{name}_{place}"
                parameter = nn.Parameter(torch.empty(end - start, columns, dtype=dtype), requires_grad=False)
                layer.register_parameter(names[name], parameter)
                if self.alike:
                    set_weight_attrs(parameter, {"weight_loader": self._loader(layer, name, weight_loader)})
                    set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, **attributes})
                else:
                    placeholders.add(name)
            self.products.append(Product(part, start, end, names))
        for name in placeholders:
            parameter = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._loader(layer, name, weight_loader), **attributes})
            layer.register_parameter(name, parameter)

    def _places(self, shard: tuple) -> list[int]:
        """Places of the parts that vLLM loads at once; ``shard`` is empty for a layer that the checkpoint has fused."""
        if not shard or shard[0] is None:
            return list(range(len(self.sizes)))
        if isinstance(shard[0], tuple):
            return list(shard[0])
        return [PLACES.get(shard[0], shard[0])]

    def _part(self, place: int) -> Storage | None:
        return self.parts[place if len(self.parts) == len(self.sizes) else 0]

    def _loader(self, layer: nn.Module, name: str, weight_loader: Callable) -> Callable:
        def load(parameter: nn.Parameter, loaded: Tensor, *shard) -> None:
            places = self._places(shard)
            part = self._part(places[0])
            if name == "weight" and part is not None:
                # not of this layer: ``guarded_state_dict``
                return
            target = parameter
            if not self.alike:
                rows = getattr(layer, f"{name}_{places[0]}")
                target = nn.Parameter(rows.new_empty(sum(self.sizes), rows.shape[1]), requires_grad=False)
                set_weight_attrs(target, {"input_dim": 1, "output_dim": 0})
            if part is not None:
                columns, dtype = part.tensors(self.k, target.dtype)[name]
                part.check_loaded(name, loaded, columns, dtype)
            weight_loader(target, loaded, *shard)
            if not self.alike:
                product = self.products[places[0]]
                rows.data.copy_(target.data[product.start : product.end])
            self.loaded |= {(name, place) for place in places}

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded, and make the metadata of sparse tensor cores."""
        for index, product in enumerate(self.products):
            places = range(len(self.sizes)) if self.alike else [index]
            for name in product.names:
                for place in places:
                    if (name, place) not in self.loaded:
                        part = self._part(place)
                        raise ValueError(
                            f"checkpoint: expected {name} of {self.prefix if part is None else part.name}, got none; "
                            f"{COPY_AGAIN}"
                        )
            if product.storage is None:
                continue
            tensors = {name: getattr(layer, layer_name).data for name, layer_name in product.names.items()}
            self._check(product, tensors)
            packed = PackedNM(**tensors, pattern=product.storage.pattern)
            layer.register_parameter(product.names["bitmask"], nn.Parameter(packed.bitmask, requires_grad=False))

    def _check(self, product: Product, tensors: dict[str, Tensor]) -> None:
        """Check tensors part by part, so that an error names the layer in the checkpoint."""
        start = 0
        for place, size in enumerate(self.sizes if self.alike else [product.end - product.start]):
            part = self._part(place) if self.alike else product.storage
            part.checked({name: tensor[start : start + size] for name, tensor in tensors.items()})
            start += size

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        outputs = []
        for storage, start, end, names in self.products:
            rows_bias = None if bias is None else bias[start:end]
            if storage is None:
                outputs.append(nn.functional.linear(tokens, getattr(layer, names["weight"]), rows_bias))
                continue
            values = getattr(layer, names["values"])
            bitmask = getattr(layer, names["bitmask"])
            scales = getattr(layer, names["scales"]) if "scales" in names else None
            outputs.append(
                ops.nm_linear(tokens, values, bitmask, scales, rows_bias, storage.pattern.n, storage.pattern.m)
            )
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y.view(*x.shape[:-1], y.shape[1])


def _tensors(part: Storage | None, k: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
    """(columns, dtype) of the tensors of a part."""
    return {"weight": (k, dtype)} if part is None else part.tensors(k, dtype)
