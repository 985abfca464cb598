"""Bundle to a running Triton Inference Server and its clients. This stage has not landed yet."""
