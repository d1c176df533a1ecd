"""The loss of a batch that is spread over a process group: global means, global Grams, and the model's graph.

Autograd convention: a collective's backward sums the cotangents of all ranks, so what reaches a rank's parameters is
the gradient of the *sum* of the ranks' losses. Data-parallel training (DDP, FSDP2) averages that over the ranks. As
every rank computes the same joined loss, the average is the gradient that one process gets on the joined batch.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from .graph import graph_nodes
from .reference import accumulation_dtype


def check_process_group(process_group, projection: int | None) -> None:
    """The arguments of the same names of :class:`sib_ext.SpatialIBLoss`, as far as they show before the first batch."""
    kinds = (dist.ProcessGroup,) if dist.is_available() else ()
    if not (process_group is None or process_group == "world" or isinstance(process_group, kinds)):
        raise ValueError(
            f"process_group must be None, 'world' or a torch.distributed.ProcessGroup that this process belongs to, "
            f"got {process_group!r}"
        )
    if projection is None:
        return
    if isinstance(projection, bool) or not isinstance(projection, int) or projection < 1:
        raise ValueError(f"projection must be None or a number of values a row, an integer >= 1, got {projection!r}")
    if process_group is None:
        raise ValueError(
            f"projection={projection} shrinks what a process group exchanges and has no meaning alone: "
            "give process_group too, or leave it out"
        )


def _resolve(process_group):
    """'world' is looked up at the call: dist.group.WORLD is None until init_process_group has run."""
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "process_group was given, but torch.distributed is not initialised in this process: "
            "call torch.distributed.init_process_group() first, or leave process_group out"
        )
    return dist.group.WORLD if process_group == "world" else process_group


class _AllSum(torch.autograd.Function):
    """The sum over the ranks, on every rank. It is its own transpose, so it can be differentiated any number of times.

    torch.distributed.nn.functional has the same, but no gather that fits: its backward sends all rows once more.
    """

    @staticmethod
    def forward(ctx, values: Tensor, group) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllSum.apply(grad, ctx.group), None


class _Gram(torch.autograd.Function):
    """The Grams [F,B,B] of the joined batch from this rank's rows [n,F,N] of F fields.

    The backward needs the cotangent's sum over the ranks, [F,B,B], and the rows gathered in the forward: the rows do
    not travel twice, as they would through a differentiable gather.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, joined: "JoinedBatch") -> Tensor:
        everyone = joined.collect(rows)
        gram = rows.new_zeros(rows.shape[1], joined.size, joined.size)
        gram[:, joined.own] = _products(rows, everyone)
        dist.all_reduce(gram, group=joined.group)
        ctx.joined = joined
        ctx.save_for_backward(rows, everyone)
        return gram

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, everyone = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the other ranks' rows are variables, too
            everyone = ctx.joined.gather(rows)
        total = _AllSum.apply(grad, ctx.joined.group)
        return ((total + total.mT)[:, ctx.joined.own] @ everyone.transpose(0, 1)).transpose(0, 1), None


def _products(rows: Tensor, everyone: Tensor) -> Tensor:
    """[n,F,N] and [B,F,N] -> [F,n,B]."""
    return rows.transpose(0, 1) @ everyone.permute(1, 2, 0)


class JoinedBatch:
    """The batches of a group's ranks as one, in the order of the ranks; of this process alone where group is None.

    Args:
        x: this rank's images [n,C,H,W]; n may differ between the ranks, C*H*W and the precision may not.
        process_group: None, ``"world"`` or a group. Every rank of it must take the same steps in the same order.
        projection: None or P, see :func:`project`.

    Raises:
        ValueError: on every rank alike, where the ranks' images do not fit.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, x: Tensor, process_group=None, projection: int | None = None):
        self.group, self.projection = _resolve(process_group), projection
        self.size = len(x)
        if self.group is None:
            return
        seed = 0 if projection is None else int(torch.randint(2**62, ()))
        ranks = self._exchange([len(x), x[0].numel(), accumulation_dtype(x.dtype).itemsize, seed], x.device)
        if len({(count, bytes_each) for _, count, bytes_each, _ in ranks}) > 1:
            found = ", ".join(f"{8 * bytes_each}-bit rows of {count}" for _, count, bytes_each, _ in ranks)
            raise ValueError(
                f"x must have the same C*H*W and precision on every rank of process_group, got, by rank: {found}"
            )
        self.sizes = [size for size, *_ in ranks]
        self.size, self.seed = sum(self.sizes), ranks[0][3]
        start = sum(self.sizes[: dist.get_rank(self.group)])
        self.own = slice(start, start + len(x))

    def _exchange(self, values: list[int], device: torch.device) -> list[list[int]]:
        """Every rank's numbers; through host memory where the group can, so that no rank waits for its GPU."""
        if "cpu:" in dist.get_backend_config(self.group):
            device = torch.device("cpu")
        own = torch.tensor(values, device=device)
        ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(ranks, own, group=self.group)
        return [rank.tolist() for rank in ranks]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks; differentiable."""
        return value if self.group is None else _AllSum.apply(value, self.group)

    def over_ranks(self, value: Tensor) -> Tensor:
        """The mean over the ranks of a number each."""
        return value if self.group is None else self.sum(value) / len(self.sizes)

    def mean(self, values: Tensor, counts: Tensor | None = None) -> Tensor:
        """The mean over the joined batch of this rank's values [n,...], or of their mean, a scalar; differentiable.

        ``counts``: bool [n], which samples count; None: all. Where none does, 0.
        """
        if counts is not None:
            counts = counts.to(values.dtype)
            total = torch.stack([(values.reshape(len(values), -1).mean(1) * counts).sum(), counts.sum()])
            total, count = self.sum(total).unbind()
            return total / count.clamp_min(1)
        mean = values.mean()
        return mean if self.group is None else self.sum(mean * (self.sizes[dist.get_rank(self.group)] / self.size))

    def cross_entropy(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> Tensor:
        """``F.cross_entropy`` of the joined batch, the normalisation by class weights and ignored labels included."""
        total = F.cross_entropy(
            logits, target, weight=weight, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
        )
        wide = accumulation_dtype(logits.dtype)
        share = torch.ones(len(target), device=logits.device)
        if not target.is_floating_point():
            counts = target != ignore_index
            share = counts if weight is None else weight[torch.where(counts, target, 0)] * counts
        # In one exchange, of one size whatever a rank's targets are.
        total, share = self.sum(torch.stack([total.to(wide), share.sum(dtype=wide)])).unbind()
        return total / share

    def collect(self, rows: Tensor) -> Tensor:
        """Every rank's rows, [n,...] -> [B,...], without a gradient; batches that differ travel padded."""
        most = max(self.sizes)
        padded = rows.detach().contiguous()
        if len(rows) < most:
            padded = torch.cat([padded, padded.new_zeros(most - len(rows), *rows.shape[1:])])
        everyone = rows.new_empty(len(self.sizes), *padded.shape)
        dist.all_gather(list(everyone), padded, group=self.group)
        if min(self.sizes) == most:
            return everyone.flatten(0, 1)
        return torch.cat([rank[:size] for rank, size in zip(everyone, self.sizes, strict=True)])

    def gather(self, rows: Tensor) -> Tensor:
        """Every rank's rows, [n,...] -> [B,...], differentiable any number of times; for small rows."""
        before, after = self.own.start, self.size - self.own.stop
        return self.sum(F.pad(rows, [0, 0] * (rows.dim() - 1) + [before, after]))

    def grams(self, vjp: Tensor, x: Tensor, mask: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """a a^T and b b^T [B,B] of the joined batch, a = R*M, b = x*M; all else as ``masked_statistics``.

        Args:
            vjp, x: R and x of this rank [n,C,H,W].
            mask: M [n,1,H,W].
            moments: [n,9] of :func:`sib_ext.masked_statistics`; its sums of squares are the exact diagonals of
                projected Grams.
        """
        fields = [(field.to(moments.dtype) * mask.to(moments.dtype)).flatten(1) for field in (vjp, x)]
        projected = self.projection is not None and self.projection < fields[0].shape[1]
        if projected:
            # Apart for each field: products of the two Grams' entries then keep their mean, and so does HSIC.
            generator = torch.Generator().manual_seed(self.seed)
            fields = [project(field, self.projection, generator) for field in fields]
        grams = _Gram.apply(torch.stack(fields, 1), self)
        if projected:
            squares = self.gather(moments[:, 2:4]).T
            grams = grams + torch.diag_embed(squares - grams.diagonal(dim1=1, dim2=2))
        return grams[0], grams[1]


def project(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random projection [n,N] -> [n,P], P = ``size``, that keeps inner products in the mean.

    The N coordinates get random signs and are dealt at random to P buckets of m = ceil(N/P); each bucket is summed:
    feature hashing (Weinberger et al. 2009, ICML) with buckets of one size, so it is exact at P >= N. It reads the
    rows once, where a dense Gaussian matrix would cost N*P products a row.

    E<Sa,Sb> = <a,b>;  Var<Sa,Sb> = q (|a|^2 |b|^2 + <a,b>^2 - 2 sum_k a_k^2 b_k^2),  q = (m-1)/(m*P-1) <= 1/P.

    Args:
        rows: floating point [n,N].
        size: P >= 1.
        generator: a CPU generator: its draws are the same for every rank and device.
    """
    each = -(-rows.shape[1] // size)
    slots = torch.randperm(size * each, generator=generator).to(rows.device)
    signs = torch.randint(2, (rows.shape[1],), generator=generator).mul_(2).sub_(1).to(rows)
    dealt = F.pad(rows * signs, (0, size * each - rows.shape[1])).index_select(1, slots)
    return dealt.unflatten(1, (size, each)).sum(2)


# ------------------------------------------------------------------------------------------------- the model's graph


@contextlib.contextmanager
def twice_differentiable(logits: Tensor, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Belongs around the VJP of ``logits`` in ``inputs``: data-parallel models' weights outlast it; names what cannot.

    FSDP2 frees a module's weights after every backward through it, so also after the VJP, though ``loss.backward()``
    will use them again: inside, its modules keep them. Looks through the graph of ``logits`` (compiled parts and
    reentrant checkpoints are opaque to it), and only where torch.distributed is in use.

    Raises:
        RuntimeError: a SyncBatchNorm that synchronises, which ``loss.backward()`` could not differentiate again; DDP
            with ``static_graph=True``, which would leave the gradients as they are on each rank; or an FSDP2 that is
            not as this version of the library knows it.
    """
    sharded = []
    if dist.is_available() and dist.is_initialized():
        for node in graph_nodes([logits.grad_fn], _furthest(inputs)):
            if node.name() == "SyncBatchNormBackward":
                raise RuntimeError(
                    "the model has a SyncBatchNorm in train mode, which PyTorch cannot differentiate twice, as the "
                    "S-IB loss must: leave out convert_sync_batchnorm (BatchNorm with each rank's own statistics), "
                    "put it in eval mode, or use GroupNorm"
                )
            if node.name() == "_DDPSinkBackward" and getattr(node.ddp_weakref(), "static_graph", False):  # type: ignore[attr-defined]
                raise RuntimeError(
                    "DistributedDataParallel with static_graph=True takes the VJP for its first backward and then "
                    "never averages the gradients: leave out static_graph=True"
                )
            if node.name() == "RegisterPostBackwardFunctionBackward":
                sharded.append(_parameter_group(node))
    before = [group.reshard_after_backward for group in sharded]
    try:
        for group in sharded:
            group.reshard_after_backward = False
        yield
    finally:
        for group, reshard in zip(sharded, before, strict=True):
            group.reshard_after_backward = reshard


def _furthest(inputs: Sequence[Tensor]) -> list[Node]:
    """The nodes behind which there is none of the inputs; empty where one is a leaf."""
    nodes = {tensor.grad_fn for tensor in inputs}
    return [] if None in nodes else [node for node in nodes if nodes.isdisjoint(set(graph_nodes([node])) - {node})]


def _parameter_group(node):
    """Where FSDPModule.set_reshard_after_backward sets its flag; the loss sees no model, but the graph leads here."""
    group = getattr(node, "param_group", None)
    if not hasattr(group, "reshard_after_backward"):
        raise RuntimeError(
            f"the FSDP2 of torch {torch.__version__} cannot be told by this version of sib_ext to keep its weights for "
            "the second derivative: use DDP, or the torch that sib_ext was tested with"
        )
    return group
