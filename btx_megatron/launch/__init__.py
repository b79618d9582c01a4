"""Running the pipeline's stages: here, each as processes of its own."""
