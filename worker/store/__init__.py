"""Every query of ours. A function here takes an open connection; its caller opens the transaction and commits it."""
