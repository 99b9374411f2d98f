"""The plugs into the Trainer: callbacks, optimizer, checkpoints, FSDP, teachers."""
