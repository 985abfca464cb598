"""A running tritonserver: started, watched, drained."""
