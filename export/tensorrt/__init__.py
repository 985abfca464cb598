"""TensorRT engines: the builder, its bindings, the shapes they are built for."""
