"""The pages, in Gradio: where things stand and what calls what."""
