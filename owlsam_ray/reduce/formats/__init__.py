"""Labels → files, one file per format; `registry` lists them."""
