"""How far sparse attention's videos are from dense attention's."""
