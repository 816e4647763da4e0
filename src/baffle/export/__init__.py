"""Bundles, made: of torch modules (``export.torch``) and of ONNX files (``export.onnx``)."""
