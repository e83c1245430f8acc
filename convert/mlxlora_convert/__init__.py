"""Every foreign format, both directions in one file: state dict in, state dict out."""
