"""HTTP that trusts nobody: deadlines for whole calls, kept connections, the guard of addresses. Knows no job."""
