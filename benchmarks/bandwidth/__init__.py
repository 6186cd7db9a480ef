"""The bandwidth suite, `zo-bench`: what a byte really buys, counted by interfaces, of this system and of others."""
