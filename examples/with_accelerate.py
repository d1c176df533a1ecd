"""S-IB with accelerate: devices, mixed precision, accumulated gradients, checkpoints of the whole state."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import CLASSES, SIZE, arguments, data, loader, shown
from sib_lab.networks.build import build_network

from sib_ext import SIBStep, SpatialIBLoss


def main(given=None):
    own = {"precision": {"default": "no", "choices": ("no", "bf16", "fp16")}, "folder": {"default": "runs/accelerate"}}
    args = arguments(__doc__, given, **own)
    accelerator = Accelerator(mixed_precision=args.precision, gradient_accumulation_steps=2)
    set_seed(0, device_specific=True)
    train, test = data(args.images)
    model = build_network("small_cnn", CLASSES, SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(train, 16))
    group = "world" if accelerator.num_processes > 1 else None
    step = SIBStep(model, SpatialIBLoss(process_group=group), scaler=accelerator.scaler)  # after prepare
    accelerator.register_for_checkpointing(step)
    for epoch in range(args.epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                terms = step.terms(*batch)
                accelerator.backward(terms.loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: cross-entropy of the last batch {terms.cross_entropy.item():.3f}")
        accelerator.save_state(f"{args.folder}/epoch{epoch + 1}")
    if accelerator.is_main_process:
        return shown(accelerator.unwrap_model(model), test)


if __name__ == "__main__":
    main()
