"""Experiments and tools of the articles beside the field of low rank: spiking networks, interpretation (extra ``research``)."""
