"""Reading the encoded bytes of images: local files, web servers, tar members and cells of Parquet tables."""
