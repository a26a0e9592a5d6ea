"""Where do models, weights and images come from?

`sources` reads a model's name (timm, open_clip, Hugging Face or a saved folder) through
`hugging_face` and `weights` into a `loaded` model, `images` opens folders, Parquet files and
datasets, and `drawing` draws pictures where there are none.
"""

# What other folders import; every other module here is private to the folder.
__all__ = ["drawing", "images", "loaded", "sources"]
