"""How far the proxy's ranking can be trusted: the same architectures trained short and long."""
