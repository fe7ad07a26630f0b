"""Encoded bytes of images, wherever they lie: files, web servers, tar members, cells of tables."""
