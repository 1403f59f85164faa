"""How fast keybroker is, against what stands beside it in the same minute."""
