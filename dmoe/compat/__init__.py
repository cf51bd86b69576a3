"""Other libraries' interfaces over this library's operators, for code and checkpoints written for them."""
