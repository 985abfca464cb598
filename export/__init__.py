"""Run folder to bundle: ONNX graphs and TensorRT engines. This stage has not landed yet."""
