"""Files on disk: safe writing and reading, images, captions, tables."""
