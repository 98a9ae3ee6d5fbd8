"""The gateway's effects: one writer that makes the kernel equal the desired state."""
