"""torch.distributed.checkpoint (DCP): what FSDP2 runs save, in every framework's dialect."""
