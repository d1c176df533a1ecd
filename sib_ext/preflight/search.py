"""Down the tree of modules, from the model to those at fault."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..graph import graph_nodes
from ..outputs import tensors_of
from .causes import NO_PATH
from .finding import OK, UNVERIFIED, Finding, because_of
from .head import Head
from .judge import judge
from .twin import kept, reseed, signature, tensors_in, twin


class Search:
    def __init__(self, model: nn.Module, x: Tensor, logits: Callable, place: str | None = None):
        """
        Args:
            logits: what the model returns -> the tensors that s is made of.
            place: of a feature map; what runs after it alone is judged.
        """
        self.place = place or ""
        self.own, self.double, self.logits = model, twin(model).double(), logits
        self.whole, self.whole_in_double, self.x = self.own, self.double, x.detach().clone().requires_grad_()
        if place is not None:
            self.whole = Head(self.own, x, place)
            self.whole_in_double = Head(self.double, x.double(), place)
            self.x = self.whole.feature_map().requires_grad_()
            self.whole_in_double.feature_map()
        self.calls: dict[str, list[tuple]] = {}
        self.no_path = False

    def findings(self) -> list[Finding]:
        """The model's first, and alone if it is ok."""
        whole = judge("", self.whole, self.whole_in_double, ((self.x,), {}), self.logits)
        whole = replace(whole, type=type(self.own).__name__)
        if whole.status == OK:
            return [whole]
        self.no_path = whole.reason == NO_PATH
        self.calls = self.calls_before_the_logits()
        below = self._below("", self.own)
        if at_fault := [f for f in below if f.at_fault]:
            whole = replace(whole, reason=because_of(at_fault), fix="")
        return [whole, *below]

    def calls_before_the_logits(self) -> dict[str, list[tuple]]:
        """The inputs of every module between x, or the feature map, and the logits."""
        calls = _calls_before_the_logits(self.own, self.whole, self.x, self.logits)
        # A module around the feature map has a part that runs before it.
        return {name: found for name, found in calls.items() if not self.place.startswith(f"{name}.")}

    def _below(self, name: str, module: nn.Module) -> list[Finding]:
        """Findings on what ``module`` calls; one that does not pass gives way to those inside it that do not."""
        findings = []
        for child_name, child in self._called_by(name, module):
            finding = self._judge(child_name, child)
            inside = self._below(child_name, child) if finding.at_fault else []
            if any(f.at_fault for f in inside):
                findings += inside
            else:
                findings += [finding, *inside]
        return findings

    def _called_by(self, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The nearest modules inside that were called (a ModuleList, for one, never is)."""
        for key, child in module.named_children():
            child_name = f"{name}.{key}" if name else key
            if child_name in self.calls:
                yield child_name, child
            else:
                yield from self._called_by(child_name, child)

    def _judge(self, name: str, module: nn.Module) -> Finding:
        """The worst of the module's different calls."""
        worst = None
        for inputs in self.calls[name]:
            finding = judge(name, module, self.double.get_submodule(name), inputs)
            if finding.reason == NO_PATH and not self.no_path:
                finding = replace(finding, status=OK, reason="", fix="")  # a side branch, as it should be
            if finding.at_fault:
                return finding
            worst = finding if worst is None or finding.status == UNVERIFIED else worst
        return worst


@dataclass
class _Calls:
    """Of one module: its inputs (args, kwargs), once for each combination of shapes and types, and what came out."""

    inputs: dict[str, tuple] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    opaque: bool = False  #: it returned something in which no tensor is found: what it calls is judged instead

    def come_before(self, nodes: set) -> bool:
        """Something of it is in that graph, or could have been (it raised, or carries no gradient)."""
        nodes_of_outputs = [z.grad_fn for z in self.outputs if z.requires_grad]
        return not nodes_of_outputs or any(n is None or n in nodes for n in nodes_of_outputs)


def _calls_before_the_logits(model: nn.Module, run: Callable, x: Tensor, logits: Callable) -> dict[str, list[tuple]]:
    """``run``: x -> what the model returns."""
    calls: dict[str, _Calls] = {}

    def entering(name: str) -> Callable:
        def note(_, args, kwargs):
            inputs = kept((args, kwargs))
            if any(t.requires_grad for t in tensors_in(inputs)):
                calls.setdefault(name, _Calls()).inputs.setdefault(signature(inputs), inputs)

        return note

    def leaving(name: str) -> Callable:
        def note(_, args, output):
            if name in calls:
                found = list(tensors_of(output))
                calls[name].outputs += found
                calls[name].opaque |= not found

        return note

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(entering(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leaving(name)))
    try:
        reseed(x.device)
        nodes = set(graph_nodes([z.grad_fn for z in logits(run(x))]))
        calls = {name: found for name, found in calls.items() if found.come_before(nodes)}
    except Exception:
        pass  # the model's own finding says so; what ran until then is recorded
    finally:
        for handle in handles:
            handle.remove()
    return {name: list(found.inputs.values()) for name, found in calls.items() if not found.opaque}
