"""One process as any rank of a run of any size, on torch's fake process group: what it sends, gets and waits for."""
