"""Where do models, weights and images come from?

`sources` reads a model's name (timm, open_clip, Hugging Face or a saved folder) through
`hugging_face` and `weights` into a `loaded` model, `images` opens folders, Parquet files and
datasets (`image_places` says which there are), and `drawing` draws them at random.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["drawing", "image_places", "images", "loaded", "sources"]
