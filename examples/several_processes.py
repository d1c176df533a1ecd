"""S-IB in several processes, with DistributedDataParallel or FSDP2: torchrun --nproc-per-node 2 several_processes.py"""

import torch
import torch.distributed as dist
from digits import CLASSES, SIZE, arguments, collate, data, shown
from sib_lab.networks.build import build_network
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from sib_ext import SIBStep, SpatialIBLoss


def main(given=None):
    own = {"fsdp": {"action": "store_true", "help": "FSDP2 instead of DistributedDataParallel"}}
    args = arguments(__doc__, given, **own)
    dist.init_process_group()
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)  # the same weights everywhere
    train, test = data(args.images)
    whole = model = build_network("small_cnn", CLASSES, SIZE).to(device)
    if args.fsdp:
        for block in (model.block3, model.block4, model):
            fully_shard(block)
    else:
        model = DistributedDataParallel(model)
    torch.manual_seed(1 + dist.get_rank())  # other draws of the terms on each rank
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step = SIBStep(model, SpatialIBLoss(process_group="world"))  # the ranks' batches count as one
    sampler = DistributedSampler(train, drop_last=True)
    batches = DataLoader(train, 32 // dist.get_world_size(), sampler=sampler, drop_last=True, collate_fn=collate)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in batches:
            terms = step.terms(*(part.to(device) for part in batch))
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: cross-entropy of the last batches {terms.cross_entropy.item():.3f}")
    state = get_model_state_dict(whole, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        trained = build_network("small_cnn", CLASSES, SIZE)
        trained.load_state_dict(state)
        shown(trained, test)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
