"""The processes of a run: how they start, share, agree, stop and notice each other's loss."""
