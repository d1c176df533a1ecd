"""What random projections cost in accuracy: Grams, HSIC, CKA and gradients against the exact ones.

    python benchmarks/bench_projection.py     # about seven minutes, needs torchvision; writes benchmarks/results/cpu/

32 crops of photographs at 224 px, a ResNet-18 with random weights, energy ratio and CKA; each P is drawn several times.
Gradients are with respect to all weights of the network, of the foreground term (CKA) and of the whole loss.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import machine, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sib_lab.data.digits_on_textures import BACKGROUNDS, normalise, picture
from torchvision.models import resnet18

from sib_ext import SpatialIBLoss, masked_statistics
from sib_ext import functional as sib
from sib_ext.distributed import JoinedBatch

SIZES = (256, 1024, 4096)
OPTIONS = {
    "seed": "target_logit",
    "mask_source": "vjp",
    "background": "energy_ratio",
    "foreground": "cka",
    "input_background": 1.0,
    "input_foreground": 0.1,
}
TERMS = {"hsic": sib.foreground_hsic, "hsic_unbiased": sib.foreground_hsic_unbiased, "cka": sib.foreground_cka}


def crops(batch: int, size: int = 224) -> torch.Tensor:
    """Photographs in [-1,1], [B,3,size,size], in turn; random places."""
    rng, images = np.random.default_rng(0), []
    for i in range(batch):
        whole = picture(BACKGROUNDS[i % len(BACKGROUNDS)])
        y, x = (rng.integers(max(side - size, 0) + 1) for side in whole.shape[:2])
        image = torch.from_numpy(whole[y : y + size, x : x + size].copy()).permute(2, 0, 1)[None]
        images.append(F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False))
    return normalise(torch.cat(images))


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


class Measurement:
    def __init__(self, batch: int):
        torch.manual_seed(0)
        model, self.x, y = resnet18(num_classes=10), crops(batch).requires_grad_(), torch.randint(10, (batch,))
        self.weights = list(model.parameters())
        criterion = SpatialIBLoss(**OPTIONS)
        logits = model(self.x)
        terms = criterion.terms(logits, y, self.x)
        self.vjp, self.mask, self.weight = terms.vjp, terms.mask, criterion.input_foreground
        # Everything but the foreground term is the same whatever is projected.
        self.rest = flat(self.derivative(terms.cross_entropy + criterion.input_background * terms.background["input"]))

    def derivative(self, output, cotangent=None):
        return torch.autograd.grad(
            output, self.weights, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    def __call__(self, projection: int | None) -> dict[str, torch.Tensor]:
        field, x = self.vjp.detach().requires_grad_(), self.x.detach()
        moments = masked_statistics(field, x, self.mask, False, False).moments
        grams = JoinedBatch(x, "world", projection).grams(field, x, self.mask, moments)
        found = {name: term(*grams) for name, term in TERMS.items()}
        (of_field,) = torch.autograd.grad(found["cka"], field, retain_graph=True)
        foreground = flat(self.derivative(self.vjp, of_field))
        return {
            "gram_vjp": sib.normalised_gram(grams[0]).detach(),
            "gram_input": sib.normalised_gram(grams[1]).detach(),
            **{name: value.detach() for name, value in found.items()},
            "gradient of the foreground": foreground,
            "gradient of the loss": self.rest - self.weight * foreground,
        }


def compared(draws: list[dict], exact: dict) -> dict[str, float]:
    row = {}
    for gram in ("gram_vjp", "gram_input"):
        errors = torch.stack([d[gram] - exact[gram] for d in draws])
        pairs = ~torch.eye(errors.shape[-1], dtype=torch.bool)
        row[f"{gram}, rms error of the cosines"] = errors[:, pairs].square().mean().sqrt().item()
    for name in TERMS:
        values = torch.stack([d[name] for d in draws])
        row[f"{name}, mean"], row[f"{name}, standard deviation"] = values.mean().item(), values.std().item()
    for name in ("gradient of the foreground", "gradient of the loss"):
        truth = exact[name].double()
        errors = [(d[name].double() - truth).norm() / truth.norm() for d in draws]
        row[f"{name}, cosine"] = np.mean([F.cosine_similarity(d[name].double(), truth, 0) for d in draws]).item()
        row[f"{name}, relative error"] = np.mean(errors).item()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--draws", type=int, default=6)
    options = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    store = Path(folder.name) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)

    measure = Measurement(options.batch)
    exact = measure(None)
    rows = {
        size: compared([measure(size) for _ in track(range(options.draws), f"P = {size}")], exact) for size in SIZES
    }
    truth = compared([exact, exact], exact)
    table = Table("", "exact", *(f"P = {size}" for size in SIZES))
    for name in truth:
        table.add_row(name, *(f"{row[name]:.3g}" for row in (truth, *rows.values())))
    Console().print(table)
    results = {"machine": machine(), **vars(options), "exact": truth, "projected": rows}
    print(save("projection", "cpu", results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
