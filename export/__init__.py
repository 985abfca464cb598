"""Run folder to bundle: ONNX graphs and TensorRT engines that agree with the student."""
