"""A data set: its files and classes, its splits, its images as a model takes them."""

from train.data.classes import HeadClasses, check_shared_names, folder_classes, named_classes, read_class_names
from train.data.datasets import Listing, build_manifest, list_files, prepare_folder
from train.data.digits import CLASS_NAMES, REGION_NAMES, DigitScenes, prepare_digits
from train.data.images import DataSplits, ImageSet, Preprocessing, read_ahead
from train.data.listing import files_below
from train.data.manifest import SPLIT_FOLDERS, SPLITS, Manifest, Record

__all__ = [
    "CLASS_NAMES",
    "REGION_NAMES",
    "SPLITS",
    "SPLIT_FOLDERS",
    "DataSplits",
    "DigitScenes",
    "HeadClasses",
    "ImageSet",
    "Listing",
    "Manifest",
    "Preprocessing",
    "Record",
    "build_manifest",
    "check_shared_names",
    "files_below",
    "folder_classes",
    "list_files",
    "named_classes",
    "prepare_digits",
    "prepare_folder",
    "read_ahead",
    "read_class_names",
]
