"""What must not hurt us, done on purpose to real processes; the name of each test is the promise."""
