"""Products of vLLM's linear layers with packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from .. import ops
from ..functional.checks import describe
from ..hf.quantizer import COPY_AGAIN
from ..ops.pattern import NMPattern
from ..packed import HUGE_PAGE, INT4, INT8, INTEGER_KINDS, KEEP, PackedNM, move_into_huge_pages

DTYPES = {kind: dtype for dtype, kind in INTEGER_KINDS.items()}
# Largest integers
LARGEST = {INT8: 127, INT4: 8}
# Places of the parts of attention's fused layer
PLACES = {"q": 0, "k": 1, "v": 2}
# Dimensions of a weight, which vLLM's loaders cut
DIMENSIONS = {"input_dim": 1, "output_dim": 0}
# Formats of vLLM that write into parameters, or read other files, without their loaders
WITHOUT_LOADERS = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")
# Bytes of weights that are moved into huge pages at a time
MOVED_TOGETHER = 4 * HUGE_PAGE


def check_load_format() -> None:
    """Raise ValueError if the engine fills parameters without their loaders."""
    load_format = get_current_vllm_config().load_config.load_format
    if load_format in WITHOUT_LOADERS:
        raise ValueError(
            f"load_format: expected one that reads the tensors of a packed checkpoint, such as auto, got {load_format}"
        )


def check_first_load(param: Tensor, name: str) -> None:
    """Raise ValueError if an engine loads its weights again, which vLLM first does with tensors without data."""
    if param.is_meta:
        raise ValueError(
            f"reload_weights: expected a model without packed layers, got {name}; start another engine instead"
        )


def without_layer(weight_loader: Callable, layer: nn.Module) -> Callable:
    """A loader of a layer as a function that does not hold it: its first argument is the layer.

    vLLM holds the loaders of all engines of a process. Of these it replaces the layer in bound methods alone, so that a
    layer which a closure holds would stay in memory.
    """
    if isinstance(weight_loader, MethodType) and weight_loader.__self__ is layer:
        return weight_loader.__func__
    return lambda _, *arguments, **keywords: weight_loader(*arguments, **keywords)


def check_loaded(name: str, loaded: Tensor, columns: int, dtype: torch.dtype, integer: int = 1) -> None:
    """Raise ValueError unless a tensor of the checkpoint has these columns, and numbers that a dtype can have.

    ``integer`` is the largest integer that is multiplied by one of the numbers.
    """
    converts = loaded.dtype.is_floating_point if dtype.is_floating_point else loaded.dtype == dtype
    if not converts or loaded.dim() != 2 or loaded.shape[1] != columns:
        raise ValueError(
            f"checkpoint: {name}: expected {columns} columns of {dtype}, got {describe(loaded)}; {COPY_AGAIN}"
        )
    if not dtype.is_floating_point or not loaded.numel():
        return
    if integer == 1 and torch.finfo(dtype).max >= torch.finfo(loaded.dtype).max:
        return
    largest = loaded.masked_fill(~loaded.isfinite(), 0.0).abs().max().float() * integer
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"dtype: expected one that has the weights of {name}, up to {largest:g}, got {dtype}; serve it in bfloat16 "
            "or float32"
        )


class Storage(NamedTuple):
    """Storage of a packed layer in the checkpoint.

    Attributes:
        name: of the layer in the config.
        pattern, values: as in ``pack_nm``.
        group: number of values that share a scale.
    """

    name: str
    pattern: NMPattern
    values: str
    group: int

    @property
    def kind(self) -> tuple:
        """Settings that layers of one product share."""
        return self.pattern, self.values, self.group

    def tensors(self, k: int, dtype: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
        """(columns, dtype) of the tensors of a weight with ``k`` columns, in a model of ``dtype``."""
        count = k // self.pattern.m * self.pattern.n
        bitmask = -(-k // 8), torch.uint8
        if self.values == KEEP:
            return {"values": (count, dtype), "bitmask": bitmask}
        values = count // 2 if self.values == INT4 else count, DTYPES[self.values]
        return {"values": values, "bitmask": bitmask, "scales": (-(-count // self.group), dtype)}

    def check_cut(self, k: int, columns: int) -> None:
        """Raise ValueError if ``k`` of all columns, those of a rank, end within a byte of the bitmask or a block."""
        if not self._fits(k, columns):
            sizes = [
                size for size in range(1, columns + 1) if columns % size == 0 and self._fits(columns // size, columns)
            ]
            block = "" if self.values == KEEP else f" or a block of {self.group} kept values with one scale"
            raise ValueError(
                f"tensor_parallel_size: expected {' or '.join(map(str, sizes))} for the {columns} columns of "
                f"{self.name}, got {columns // k}: a byte of the bitmask{block} would be on two ranks"
            )

    def _fits(self, k: int, columns: int) -> bool:
        whole_bytes = k % max(self.pattern.m, 8) == 0
        whole_blocks = self.values == KEEP or k // self.pattern.m * self.pattern.n % self.group == 0
        return k == columns or (whole_bytes and whole_blocks)

    def packed(self, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> PackedNM:
        """Make a checked weight of loaded tensors; ValueError, as of transformers' loader, if they are damaged."""
        try:
            packed = PackedNM(**tensors, pattern=self.pattern).check()
            return packed if dtype is None else packed.to(dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint: {self.name}.{error}") from error


class Product(NamedTuple):
    """A product of a layer.

    Attributes:
        storage: of its rows in the checkpoint; None for dense ones.
        start, end: its rows of the layer.
        names: names of its parameters in vLLM's layer, by name in the checkpoint.
    """

    storage: Storage | None
    start: int
    end: int
    names: dict[str, str]


class HugePages:
    """Weights of a model on a CPU, which are moved into huge pages as they are loaded.

    They are moved some at a time, since small neighbours share a page. The last ones, if they are few, stay.
    """

    def __init__(self):
        self.tensors: list[Tensor] = []

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add the weights of a loaded layer, of which only those on a CPU are moved."""
        self.tensors += [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if sum(tensor.nbytes for tensor in self.tensors) >= MOVED_TOGETHER:
            move_into_huge_pages(self.tensors)
            self.tensors.clear()


class PackedLinearMethod(LinearMethodBase):
    """Method of a layer with packed parts.

    Values, bitmask and scales are matrices with the rows of the weight, so vLLM's loaders cut them like a weight, by
    rows or columns. Parts of one kind share their parameters and a product. Otherwise each part has its own: the loader
    writes it into a matrix of all rows, from which its rows are copied.

    Args:
        prefix: name of the layer in vLLM's model.
        parts: storage of each part in the checkpoint, None for a dense one.
        pages: of the model.
    """

    def __init__(self, prefix: str, parts: Sequence[Storage | None], pages: HugePages):
        self.prefix = prefix
        self.parts = parts
        self.pages = pages
        self.alike = len({part and part.kind for part in parts}) == 1
        self.products: list[Product] = []
        # (name in the checkpoint, place of a part)
        self.loaded: set[tuple[str, int]] = set()

    def create_weights(self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int],
                       input_size: int, output_size: int, params_dtype: torch.dtype,
                       weight_loader: Callable, **attributes) -> None:  # fmt: skip
        check_load_format()
        k = input_size_per_partition
        for part in self.parts:
            if part is not None:
                part.check_cut(k, input_size)
        if not self.alike and len(self.parts) != len(output_partition_sizes):
            kinds = ("dense" if part is None else f"{part.pattern} {part.values}" for part in self.parts)
            raise ValueError(
                f"quantization_config: expected layers of one kind in {self.prefix} of vLLM's model, got "
                f"{', '.join(kinds)}"
            )
        self.columns = input_size
        self.sizes = list(output_partition_sizes)

        def register(layer_name: str, name: str, rows: int, width: int, dtype: torch.dtype, **more) -> None:
            parameter = nn.Parameter(torch.empty(rows, width, dtype=dtype), requires_grad=False)
            loader = self._loader(layer, name, weight_loader)
            set_weight_attrs(parameter, {"weight_loader": loader, **attributes, **more})
            layer.register_parameter(layer_name, parameter)

        # vLLM looks for a tensor's loader in the parameter of its name; also packed layers may have a "weight", see
        # ``guarded_state_dict``, and its device is that of LoRA's tensors
        register("weight", "weight", 0, 0, params_dtype)
        ends = list(accumulate(self.sizes))
        spans = [(0, ends[-1])] if self.alike else zip([0, *ends], ends, strict=False)
        for place, (start, end) in enumerate(spans):
            part = self.parts[place]
            tensors = {"weight": (k, params_dtype)} if part is None else part.tensors(k, params_dtype)
            names = {name: name if self.alike else f"{name}_{place}" for name in tensors}
            for name, (width, dtype) in tensors.items():
                if not self.alike:
                    register(name, name, 0, 0, params_dtype)
                register(names[name], name, end - start, width, dtype, **DIMENSIONS)
            self.products.append(Product(part, start, end, names))

    def _part(self, place: int) -> Storage | None:
        return self.parts[place if len(self.parts) == len(self.sizes) else 0]

    def _places(self, shard: tuple) -> list[int]:
        """Places of the parts that are loaded at once; ``shard`` is empty if the checkpoint has the layer fused."""
        if not shard or shard[0] is None:
            return list(range(len(self.sizes)))
        if isinstance(shard[0], tuple):
            return list(shard[0])
        place = PLACES.get(shard[0], shard[0])
        if place not in range(len(self.sizes)):
            raise ValueError(
                f"vLLM: expected parts q, k, v or 0 to {len(self.sizes) - 1} of the packed layer {self.prefix}, got "
                f"{shard[0]!r}"
            )
        return [place]

    def _loader(self, layer: nn.Module, name: str, weight_loader: Callable) -> Callable:
        load_dense = without_layer(weight_loader, layer)

        def load(layer: nn.Module, param: nn.Parameter, loaded_weight: Tensor, *shard) -> None:
            places = self._places(shard)
            part = self._part(places[0])
            check_first_load(param, self.prefix)
            if name == "weight" and part is not None:
                return
            rows = None if self.alike else getattr(layer, f"{name}_{places[0]}").data
            if rows is not None:
                param = nn.Parameter(rows.new_empty(sum(self.sizes), rows.shape[1]), requires_grad=False)
                set_weight_attrs(param, DIMENSIONS)
            if part is not None:
                columns, dtype = part.tensors(self.columns, param.dtype)[name]
                integer = LARGEST[part.values] if name == "scales" else 1
                check_loaded(f"{part.name}.{name}", loaded_weight, columns, dtype, integer)
            load_dense(layer, param, loaded_weight, *shard)
            if rows is not None:
                product = self.products[places[0]]
                rows.copy_(param.data[product.start : product.end])
            self.loaded |= {(name, place) for place in places}

        return MethodType(load, layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the loaded tensors, and make the metadata of sparse tensor cores; on a CPU fill huge pages."""
        for index, product in enumerate(self.products):
            places = range(len(self.sizes)) if self.alike else [index]
            start = 0
            for place in places:
                part = self._part(place)
                for name in product.names:
                    if (name, place) not in self.loaded:
                        raise ValueError(
                            f"checkpoint: expected {name} of {self.prefix if part is None else part.name}, got none; "
                            f"{COPY_AGAIN}"
                        )
                # part by part, so that an error has the name in the checkpoint
                end = start + self.sizes[place]
                if part is not None:
                    part.packed({name: tensor[start:end] for name, tensor in self._tensors(layer, product).items()})
                start = end
            if product.storage is not None:
                packed = PackedNM(**self._tensors(layer, product), pattern=product.storage.pattern)
                layer.register_parameter(product.names["bitmask"], nn.Parameter(packed.bitmask, requires_grad=False))
            for name in product.names if not self.alike else ():
                if name != "weight" and hasattr(layer, name):
                    delattr(layer, name)
        self.pages.add(x for product in self.products for x in self._tensors(layer, product).values())

    def _tensors(self, layer: nn.Module, product: Product) -> dict[str, Tensor]:
        return {name: getattr(layer, layer_name).data for name, layer_name in product.names.items()}

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., rows] of x [..., K], by one operation of torch for each product: ``ops.nm_linear``."""
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        outputs = []
        for storage, start, end, names in self.products:
            rows_bias = None if bias is None else bias[start:end]
            if storage is None:
                outputs.append(nn.functional.linear(tokens, getattr(layer, names["weight"]), rows_bias))
            else:
                values = getattr(layer, names["values"])
                bitmask = getattr(layer, names["bitmask"])
                scales = getattr(layer, names["scales"]) if "scales" in names else None
                pattern = storage.pattern
                outputs.append(ops.nm_linear(tokens, values, bitmask, scales, rows_bias, pattern.n, pattern.m))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y.view(*x.shape[:-1], y.shape[1])
