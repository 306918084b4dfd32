"""What the commands do beyond parsing: messages, live progress, checks of the machine."""
