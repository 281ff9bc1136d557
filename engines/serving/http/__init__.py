"""A server that a client of Triton or KServe can talk to: Open Inference Protocol v2 over HTTP."""
