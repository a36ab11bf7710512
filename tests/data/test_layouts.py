"""Folders as people have them: what each is read as, or the words it is refused with."""

import importlib
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rad.data import load_dataset
from rad.data.doubts import is_binary
from rad.data.listing import list_files
from rad.data.roles import is_good, mask_stem, meaning_of
from rad.data.summary import describe, summarise
from rad.image_reader import decode


def encode(pixels: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


PHOTO = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[2:4, 3:6] = 255
FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF"}
BYTES = {(i, s): encode(p, f) for i, p in enumerate((PHOTO, MASK)) for s, f in FORMATS.items()}


def plant(root: Path, tree: str) -> Path:
    """Writes what lines such as "good 5" (0.png to 4.png), "!masks/#_gt.png 2" (masks) and "labels.csv = text" say."""
    for line in filter(None, map(str.strip, re.split(r"[;\n]", tree))):
        if " = " in line:
            name, text = line.split(" = ")
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
            continue
        is_mask, (name, count) = line.startswith("!"), line.lstrip("!").rsplit(" ", 1)
        name = name if Path(name).suffix.lower()[1:] in FORMATS else f"{name}/#.png"
        for number in range(int(count)):
            path = root / name.replace("#", str(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(BYTES[is_mask, path.suffix.lower()[1:]])
    return root


def counts(root: Path, **flags) -> str:
    """How many images are trained on, good and bad ones of the test, and masks: "8 2+3 1"."""
    train = load_dataset(root, split="train", **flags)
    try:
        test = load_dataset(root, split="test", **flags).samples
    except ValueError as error:
        assert "no 'test' split" in str(error)
        return f"{len(train)}"
    bad = [sample for sample in test if sample.label]
    assert all(sample.mask.is_file() for sample in bad if sample.mask)
    masks = sum(sample.mask is not None for sample in bad)
    return f"{len(train)} {len(test) - len(bad)}+{len(bad)}" + (f" {masks}" if masks else "")


READ = [
    # Good and bad side by side
    ("good 10; bad 3", "8 2+3"),
    ("Good 10; Bad 3", "8 2+3"),
    ("OK 10; NG 3", "8 2+3"),
    ("ok 5; nok 3", "4 1+3"),
    ("OK 5; not_ok 3", "4 1+3"),
    ("PASS 5; FAIL 3", "4 1+3"),
    ("pass 5; fail 3", "4 1+3"),
    ("passed 5; rejected 3", "4 1+3"),
    ("normal 5; abnormal 3", "4 1+3"),
    ("normal 5; anomaly 3", "4 1+3"),
    ("Normal 5; Anomalous 3", "4 1+3"),
    ("defective 3; non_defective 5", "4 1+3"),
    ("defective 3; Non-Defective 5", "4 1+3"),
    ("defect 3; defect_free 5", "4 1+3"),
    ("defect 3; DefectFree 5", "4 1+3"),
    ("Defect_images 3; NODefect_images 5", "4 1+3"),
    ("no defect 5; defect 3", "4 1+3"),
    ("def_front 3; ok_front 5", "4 1+3"),
    ("clean 5; dirty 3", "4 1+3"),
    ("good 5; not good 3", "4 1+3"),
    ("good 5; scratch 2; dent 1", "4 1+3"),
    ("good 5; kind_b 2; some thing 1", "4 1+3"),
    ("healthy 5; damaged 3", "4 1+3"),
    ("gut 5; schlecht 3", "4 1+3"),
    ("iO 5; niO 3", "4 1+3"),
    ("i.O. 5; n.i.O. 3", "4 1+3"),
    ("Gutteile 5; Ausschuss 3", "4 1+3"),
    ("Werk1/Linie2/iO 5; Werk1/Linie2/niO/Riss 3", "4 1+3"),
    ("is_good=1 5; is_good=0 3", "4 1+3"),
    ("has_defect_false 5; has_defect_true 3", "4 1+3"),
    ("conforme 5; non conforme 3", "4 1+3"),
    ("sans_défaut 5; défaut 3", "4 1+3"),
    ("bueno 5; defectuoso 3", "4 1+3"),
    ("buoni 5; scarti 3", "4 1+3"),
    ("aprovado 5; reprovado 3", "4 1+3"),
    ("良品 5; 不良品 3", "4 1+3"),
    ("正常 5; 异常 3", "4 1+3"),
    ("합격 5; 불합격 3", "4 1+3"),
    ("good_#.png 5; bad_#.png 3", "4 1+3"),
    ("有缺陷 3; 没有缺陷 5", "4 1+3"),
    ("キズあり 3; キズなし 5", "4 1+3"),
    ("불량 없음 5; 불량 있음 3", "4 1+3"),
    ("with defects 3; without_defects 5", "4 1+3"),
    ("ungood 3; goodParts 5", "4 1+3"),
    ("00_OK 5; 01_NG_scratch 3", "4 1+3"),
    ("img_#_ok.jpg 5; img_#_ng.jpg 3", "4 1+3"),
    ("lot1/good 5; lot1/bad 1; lot2/good 5; lot2/scratch 2", "8 2+3"),
    ("OK-#.jpg 5; NG-#.jpg 3", "4 1+3"),
    ("nonok 3; ok 5", "4 1+3"),
    ("n_ok_#.png 3; ok_#.png 5", "4 1+3"),
    ("isnt_ok 3; ok 5", "4 1+3"),
    ("inconforme 3; conforme 5", "4 1+3"),
    # Train and test
    ("train/normal 5; test/abnormal 3", "5 0+3"),
    ("train/normal 5; test/normal 2; test/abnormal 3", "5 2+3"),
    ("train/Good 5; test/Good 1; test/Bad 3", "5 1+3"),
    ("Training/OK 5; Testing/NG 3", "5 0+3"),
    ("train_good 5; test_good 1; test_bad 3", "5 1+3"),
    ("good/train 5; good/test 1; bad/test 3", "5 1+3"),
    ("train 5; test/good 2; test/scratch 3", "5 2+3"),
    ("train 5; test/good 2; test/broken 1; test/odd 1", "5 2+2"),
    ("train/good 5; train/bad 4; test/good 1; test/bad 3", "5 1+3"),
    ("train/good 5; train/bad 4", "4 1+4"),
    ("train/good 5; val/good 2; val/bad 3", "5 2+3"),
    ("train/good 5; val/good 2; test/good 1; test/bad 3", "5 1+3"),
    ("train/good 5; test/good 1; test/dent 2; !ground_truth/dent/#_mask.png 2", "5 1+2 2"),
    ("训练/良品 5; 测试/良品 1; 测试/不良品 2", "5 1+2"),
    ("train/ok_front 5; train/def_front 4; test/ok_front 1; test/def_front 3", "5 1+3"),
    ("images/train/good 5; images/train/bad 3; images/val/good 2; images/val/bad 2", "5 2+5"),
    ("nut/train/good 5; nut/Test/ok 2; nut/Test/ng 3", "5 2+3"),
    ("nut/train/good 5; nut/test/normal 2; nut/test/ng 3", "5 2+3"),
    ("nut/train/ok 5; nut/test/OK 2; nut/test/NG 3", "5 2+3"),
    ("a/train/Good 5; a/test/Bad 3; b/train/good 4; b/test/bad 2; c/OK 5; c/NG 1", "13 1+6"),
    ("nut/train/good 5; nut/test/film/good 2; nut/test/film/anomaly 3", "5 2+3"),
    # Masks
    ("good 5; !ground_truth 5", "5"),
    ("good 5; bad 3; !masks 2", "4 1+3 2"),
    ("good 5; dent 1; scratch 1; !ground_truth/dent/#_mask.png 1", "4 1+2 1"),
    ("normal_dir 5; abnormal_dir 3; !mask_dir 3", "4 1+3 3"),
    ("normal 5; abnormal 3; !GT 3", "4 1+3 3"),
    ("images/good 5; images/bad 3; !masks/bad/#_GT.png 3", "4 1+3 3"),
    ("good/images 5; bad/images 3; !bad/masks 3", "4 1+3 3"),
    ("good 5; bad/#.jpg 2; !bad/#_mask.png 2", "4 1+2 2"),
    ("good 5; bad/#.jpg 2; !bad/#.png 2", "4 1+2 2"),
    ("good 5; bad/#.jpg 2; !bad/mask-#.png 2", "4 1+2 2"),
    ("Data/Images/Normal 5; Data/Images/Anomaly 2; !Data/Masks/Anomaly 2", "4 1+2 2"),
    ("OK/S0001 5; NG/AK/S0001/#.jpg 2; !NG/AK/S0001/#.png 2", "4 1+2 2"),
    ("nut/train/good/#.jpg 5; !nut/train/good/#_mask.png 5; nut/test/good 2", "5 2+0"),
    ("nut/train/good 5; nut/test/bad/images 2; !nut/test/bad/masks 2", "5 0+2 2"),
    ("nut/train/good 5; nut/test/good/img 1; nut/test/ungood/img 2; !nut/test/ungood/label 2", "5 1+2 2"),
    ("good 5; scratch 1; !scratch_masks 1; dent 1; !dent_masks 1", "4 1+2 2"),
    ("good 5; bad/1/image.png 1; !bad/1/mask.png 1; bad/2/image.png 1; !bad/2/mask.png 1", "4 1+2 2"),
    ("nut/train/good 5; nut/test/dent 2; !nut/ground_truth/Dent/#_mask.png 2", "5 0+2 2"),
    ("nut/train/good 5; nut/test/Dent 2; !nut/ground_truth/dent_masks 2", "5 0+2 2"),
    ("nut/train/good 5; nut/test/left 2; nut/test/right 2; !nut/ground_truth/left 2", "5 0+4 2"),
    ("nut/train/good 5; nut/test/dent 2; nut/test/good 2; !nut/ground_truth/good 2", "5 2+2"),
    ("nut/train/good 5; nut/test/dent 2; !nut/ground_truth 9", "5 0+2 2"),
    ("train/good 5; test/crack 2; !masks/test/crack 2", "5 0+2 2"),
    ("images/train/good 5; images/test/bad 2; !masks/test/bad 2", "5 0+2 2"),
    ("good 5; bad/NG_#.png 2; !masks/#.png 2", "4 1+2 2"),
    ("OK/part_#_OK.png 5; NG/part_1#_NG.png 2; !GT/part_1#.png 2", "4 1+2 2"),
    # Plain
    ("#.png 5", "5"),
    ("good/#.png 5; good/#_left.png 5", "10"),
    ("good/#.png 5; good/#_copy.png 2; bad 1", "6 1+1"),
    ("photos 5", "5"),
    ("#.png 2; camera2 3", "5"),
    ("camera1 2; camera2 3", "5"),
    ("2024-05-01 2; 2024-05-02/batch_03 3", "5"),
    ("LineA 2; LineB 3", "5"),
    ("links 2; KW12 3", "5"),
    ("2024/05/01 2; 2024/05/02 3", "5"),
    ("#_0.png 3; #_1.png 3", "6"),
    ("L#.png 3; R#.png 3", "6"),
    ("IMG_000#.png 10; IMG_001#.png 10", "20"),
    ("-#.png 3; photo_#_.png 2", "5"),
    ("good/nut_#.png 3; good/bolt_#.png 3", "6"),
    ("good/scratch_test_#.png 5; bad/scratch_test_#.png 3", "4 1+3"),
    ("good 5; bad 3; labels.csv = 0.png,1", "4 1+3"),
    ("good 5; bad 3; bad/0.xml = <a/>", "4 1+3"),
    ("DCIM/100CANON/IMG_#.jpg 2; DCIM/101CANON 3", "5"),
    ("nut_left_#.png 3; nut_right_#.png 2", "5"),
    ("#.png 5; 0.xmp = <x/>; log.txt = dull; config.json = {'exposure': 3}", "5"),
    ("IMG_#.jpg 3; DSC_#.jpg 3; notes.txt = what I saw; readme.md = 0.png", "6"),
    ("#.png 5; broken.png = no image", "6"),
    ("good 5", "5"),
    ("nuts/good 5", "5"),
    ("train/good 5", "5"),
    ("train 5", "5"),
    ("bad lighting/good 5", "5"),
]
REFUSED = [
    ("good/#.png 5; good/n_ok_#.png 2; bad 2", "good/n_ok_0.png lies among good images"),
    ("good/#.png 5; good/overlay_#.png 5", "good/overlay_0.png lies among good images"),
    ("good/#.png 5; good/#_hm.png 5", "good/0_hm.png lies among good images"),
    ("good/#.png 5; good/unsure_#.png 1", "good/unsure_0.png lies among good images"),
    ("bad/#.png 3; bad/#_heatmap.png 3; good 5", "bad/0_heatmap.png lies among defects"),
    ("bad/#.png 4; bad/ok_#.png 1; good 5", "bad/ok_0.png lies among defects"),
    ("nut/train/good/#.png 5; nut/train/good/#_hm.png 5; nut/test/bad 2", "0_hm.png lies among good images"),
    (
        "nut/train/good 5; nut/test/bad/#.png 2; nut/test/bad/#_overlay.png 2",
        "nut/test/bad/0_overlay.png lies among defects, but its name says otherwise",
    ),
    ("ok 5; false_ok 2; nok 3", "false_ok says neither good nor bad"),
    ("good 5; bad 3; fp 2", "fp says neither good nor bad"),
    ("good 5; almost_good 2; bad 2", "almost_good says neither good nor bad"),
    ("good 5; rework 2", "rework says neither good nor bad"),
    ("good 5; calibration 2", "calibration says neither good nor bad"),
    ("good 5; crops 3", "crops says neither good nor bad"),
    ("good 5; good_unknown 3", "good_unknown says neither good nor bad"),
    ("train/good 5; pool 4; test/bad 2", "but not of the images 4 in pool"),
    ("0_#.png 5; 1_#.png 5; 2_#.png 5", "its files bear the names of several kinds: 5 0, 5 1, 5 2"),
    ("#_+.png 5; 1#_-.png 3", "its files bear the names of several kinds: 5 \\+, 3 -"),
    ("Platine/good 5; Platine/bad 2; Gehaeuse/bad 2", "Gehaeuse/bad is of no category that has good images"),
    ("good 5; bad/a/#.png 2; bad/b/#.png 2; !masks/#_mask.png 2", "bears the name of two defects"),
    ("good 5; bad/#.jpg 2; !bad/#_mask.png 2; !bad/#_mask_b.png 2", "one of several masks of an image"),
    ("good/#.png 5; good/scratch_#.png 1", "good/scratch_0.png lies among good images, but its name says otherwise"),
    ("good/#.png 5; good/NG_#.png 2; bad 3", "good/NG_0.png lies among good images"),
    ("good/#.png 5; good/#_heatmap.png 5", "good/0_heatmap.png lies among good images"),
    ("good/#.png 5; good/#_overlay.png 5; bad 1", "good/0_overlay.png lies among good images"),
    ("good/#.png 5; good/#_depth.png 5", "good/0_depth.png lies among good images"),
    ("#.png 5; dent_#.png 1", "dent_0.png lies among good images"),
    ("train/good/#.png 5; train/good/crack1.png 1; test/good 2; test/bad 2", "good/crack1.png lies among good images"),
    (
        "nut/train/good/#.png 5; nut/train/good/crack_#.png 1; nut/test/bad 2",
        "good/crack_0.png lies among good images",
    ),
    ("good 5; good/0.txt = 0 0.5 0.5 0.1 0.1", "the file good/0.txt seems to hold labels"),
    ("good 5; bad 2; good/labels.csv = 0.png,1", "the file good/labels.csv seems to hold labels"),
    (
        "nut/train/good 5; nut/test/bad 2; nut/train/good/0.json = {}",
        "the file nut/train/good/0.json seems to hold labels",
    ),
    ("g_#.png 5; b_#.png 3", "its files bear the names of several kinds: 3 b, 5 g"),
    ("p#.png 5; n#.png 5", "its files bear the names of several kinds: 5 n, 5 p"),
    ("0_#.png 5; 1_#.png 5", "its files bear the names of several kinds: 5 0, 5 1"),
    ("00#_0.png 5; 01#_1.png 3", "its files bear the names of several kinds: 5 0, 3 1"),
    ("+#.png 5; -#.png 3", "its files bear the names of several kinds: 5 \\+, 3 -"),
    ("00 5; 01 4", "holds 5 in 00, 4 in 01"),
    ("-1 5; 1 4", "holds 5 in -1, 4 in 1"),
    ("+ 5; - 4", "holds 5 in \\+, 4 in -"),
    ("A1 5; A2 4", "holds 5 in A1, 4 in A2"),
    ("M6 2; M8 3", "holds 2 in M6, 3 in M8"),
    ("photos/0 5; photos/1 4", "holds 5 in 0, 4 in 1"),
    ("good 5; bad 3; unsure 2", "unsure says neither good nor bad"),
    ("ok 5; nok 3; to_check 2", "to_check says neither good nor bad"),
    ("valid 5; invalid 3", "but not of the images 5 in valid"),
    ("good 5; Augmented 2", "Augmented says neither good nor bad"),
    ("images 5; overlay 5", "overlay says neither good nor bad"),
    ("nut/train/good/img 5; nut/train/good/xyz 5; nut/test/hole/img 2", "good/xyz says neither good nor bad"),
    ("nut/train/good 5; nut/train/good/bad 2; nut/test/bad 2", "good/bad says both good and bad"),
    ("nut/train/good 5; nut/train/#.png 4; nut/test/bad 2", "but not of the images 4 in train"),
    ("nut/train/good/#.jpg 5; !nut/train/good/x#.png 2; nut/test/good 2", "2 of 7 pictures are of few values"),
    ("good 5; bad/img 3; !bad/spots 3", "pictures are of few values as masks are .*bad/spots"),
    ("kos01/Part#.jpg 3; !kos01/Part#_mask.bmp 3", "3 of them seem to be masks"),
    ("#.png 5; NG_#.png 1", "NG_0.png.* but not of the images 5"),
    ("crazing_#.jpg 3; patches_#.jpg 3", "its files bear the names of several kinds: 3 crazing, 3 patches"),
    ("scratch_#.jpg 3; dent_#.jpg 3", "its files bear the names of several kinds: 3 dent, 3 scratch"),
    ("#_temp.jpg 3; #_test.jpg 3", "its files bear the names of several kinds: 3 temp, 3 test"),
    ("#.jpg 3; #_depth.png 3", "its files bear the names of several kinds: 3 others, 3 depth"),
    ("#_label_0.jpg 3; #_label_1.jpg 3", "6 of them seem to be masks"),
    ("A 5; B 4", "holds 5 in A, 4 in B"),
    ("0 5; 1 4; 2 4", "holds 5 in 0, 4 in 1, 4 in 2"),
    ("D/CD 5; D/UD 4", "holds 5 in CD, 4 in UD"),
    ("part_#.png 5; part_1#_NG.png 2", r"part_10_NG.png, part_11_NG.png\), but not of the images 5"),
    ("#.png 5; classes.txt = ok", "the file classes.txt seems to hold labels"),
    ("#.png 5; results.csv = filename,label", "the file results.csv seems to hold labels"),
    ("#.png 5; a.csv = ImageId_ClassId,EncodedPixels", "the file a.csv seems to hold labels"),
    ("#.png 5; meta.jsonl = {'file_name': '0.png'}", "the file meta.jsonl seems to hold labels"),
    ("#.png 5; masks/0.npy = 3", "the file masks/0.npy seems to hold labels"),
    ("#.png 5; 0.mat = 3", "the file 0.mat seems to hold labels"),
    ("images 5; !masks 5", r"5 of them seem to be masks \(such as masks/0.png\)"),
    ("#.png 5; !ground_truth 2", "2 of them seem to be masks"),
    ("#.jpg 5; !#_mask.png 5", "seem to be masks"),
    ("train/#.png 5; !train/#_mask.png 5", "seem to be masks"),
    ("!#.png 5", r"5 of 5 pictures are of few values as masks are \(such as 0.png\)"),
    ("#.jpg 5; !x#.png 1", r"1 of 6 pictures are of few values .*x0.png"),
    ("good/#.jpg 5; !good/x#.png 1; bad 2", r"1 of 5 pictures are of few values .*good/x0.png"),
    ("bottle 5; cable 4", "holds 5 in bottle, 4 in cable"),
    ("#.png 5; odd 4", r"holds 4 in odd, 5 in the folder itself"),
    ("0 5; 1 4", "holds 5 in 0, 4 in 1"),
    ("positive 5; negative 4", "holds 4 in negative, 5 in positive"),
    ("day1/odd 5; day2/strange 4", "holds 5 in day1/odd, 4 in day2/strange"),
    ("crazing 5; inclusion 4; patches 3", "holds 5 in crazing"),
    ("bad 5", "all of them lie in bad"),
    ("defects/monday 5; defects/tuesday 5", "all of them lie in defects"),
    ("scratch 5; dent 4", "all images seem to be defects"),
    ("bad_#.png 5", "all images seem to be defects"),
    ("#.png 5; scratch 4", "but not of the images 5 in the folder itself"),
    ("good 5; #.png 4", "but not of the images 4 in the folder itself"),
    ("good 5; 2024-05-01 4", r"some names tell good or bad \(good\), but not of the images 4 in 2024-05-01"),
    ("good 5; unlabelled 4", "unlabelled says neither good nor bad"),
    ("bottle/good 5; bottle/bad 1; cable 4", "but not of the images 4 in cable"),
    ("good_#.png 5; #.png 4", "but not of the images 4 in the folder itself"),
    ("train 5; test 4", "test tells train or test, but nothing tells good from bad"),
    ("good 5; test 4", "but not of the images 4 in test"),
    ("train 5; test/good 1; test/monday 4", "but not of the images"),
    ("good 5; good/scratch 4", "but not of the images 5 in the folder itself"),
    ("good 5; good/scratch 4; bad 2", "good/scratch says both good and bad"),
    ("good_and_bad 5; good 4", "good_and_bad says both good and bad"),
    ("ok_ng 5", "all of them lie in ok_ng"),
    ("#.png 5; 3.txt = 0 0.5 0.5 0.1 0.1", "the file 3.txt seems to hold labels"),
    ("#.png 5; 3.xml = <defect/>", "the file 3.xml seems to hold labels"),
    ("photos 5; labels.csv = a", "the file labels.csv seems to hold labels"),
    ("photos 5; table.csv = 3.png,1", "the file table.csv seems to hold labels"),
    ("images 5; _annotations.coco.json = {}", "the file _annotations.coco.json seems to hold labels"),
    ("images 5; labels/3.txt = 0 0.5 0.5 0.1 0.1", "the file labels/3.txt seems to hold labels"),
    ("imgs 5; json/3.json = {}", "the file json/3.json seems to hold labels"),
    ("good 5; bad/monday 2; !masks/tuesday/0.png 1; !masks/friday/0.png 1", "has two masks"),
    ("good 5; bad 2; !masks/x#.png 2", "2 of the 2 defects in .* have no mask of their name"),
    ("good 5; bad 6; !masks/0_mask.png 1; !masks/x#.png 5", "5 of the 6 defects in .* have no mask of their name"),
    (
        "nut/train/good 5; nut/test/dent 2; !nut/ground_truth/dents/#_mask.png 2",
        "2 of the 2 .* have no mask of their name",
    ),
    (
        "nut/train/good 5; nut/test/dent 2; !nut/ground_truth/dent/#_m.png 2",
        "2 of the 2 defects .* no mask of their name",
    ),
    (
        "nut/train/good 5; nut/test/dent 2; nut/test/left 1; !nut/ground_truth/dent 2; !nut/ground_truth/lft 1",
        "1 of the 3 defects in .* no mask of their name and kind, such as test/left/0.png, though 1 .*/lft/0.png",
    ),
]


@pytest.mark.parametrize(("tree", "expected"), READ, ids=[tree for tree, _ in READ])
def test_what_names_tell_is_read(tmp_path, tree, expected):
    assert counts(plant(tmp_path / "nuts", tree)) == expected


@pytest.mark.parametrize(("tree", "message"), REFUSED, ids=[tree for tree, _ in REFUSED])
def test_what_is_not_clear_is_refused(tmp_path, tree, message):
    root = plant(tmp_path / "nuts", tree)
    if not any(words in message for words in ("mask of their name", "two masks", "two defects", "several masks")):
        message = (
            f"not clear which images in .* are good: .*{message}.*--good GLOB --bad GLOB --masks GLOB, or --all_good"
        )
    with pytest.raises(ValueError, match=message):
        load_dataset(root, split="train")
        load_dataset(root, split="test")


CATEGORIES = [
    ("bottle/good 5; bottle/bad 1; cable/good 10; cable/bad 2", {"bottle": "4 1+1", "cable": "8 2+2"}),
    ("good/bottle 5; good/cable 10; bad/bottle 1; bad/cable 2", {"bottle": "4 1+1", "cable": "8 2+2"}),
    ("bottle/train/Normal 5; bottle/test/Abnormal 1; nut/train/Normal 6", {"bottle": "5 0+1", "nut": "6"}),
    ("train/bottle/OK 5; test/bottle/OK 2; test/bottle/NG 1; train/nut/OK 6", {"bottle": "5 2+1", "nut": "6"}),
    ("good/left 5; good/right 5; bad/left 1", {"nuts": "8 2+1"}),
    ("good 10; bad/bottle 1; bad/cable 2", {"nuts": "8 2+3"}),
]


@pytest.mark.parametrize(("tree", "expected"), CATEGORIES, ids=[tree for tree, _ in CATEGORIES])
def test_categories_lie_above_or_below_good_and_bad(tmp_path, tree, expected):
    root = plant(tmp_path / "nuts", tree)
    assert load_dataset(root).categories == sorted(expected)
    for category, found in expected.items():
        train = load_dataset(root, categories=[category])
        test = [s for s in load_dataset(root, split="test").samples if s.category == category]
        bad = sum(sample.label for sample in test)
        assert f"{len(train)}" + (f" {len(test) - bad}+{bad}" if test else "") == found
    with pytest.raises(ValueError, match="has no categor(y|ies)"):
        load_dataset(root, categories=["screw"])


@pytest.mark.parametrize(
    ("tree", "kinds"),
    [
        ("good 5; scratch 2; dent 1; odd 1", {"scratch", "dent", "odd"}),
        ("good 5; bad/scratch/monday 2; bad/odd 1; bad 1", {"scratch", "odd", "bad"}),
        ("train/good 5; test/Bad 2; test/thread 1", {"Bad", "thread"}),
        ("OK 5; NG/AK/S0001 1; NG/BX/S0001 1", {"AK", "BX"}),
        ("good/bottle 5; bad/bottle 1", {"bad"}),
        ("good_#.png 5; bad_#.png 1", {"bad"}),
    ],
)
def test_kinds_of_defects_bear_the_name_of_their_folder(tmp_path, tree, kinds):
    test = load_dataset(plant(tmp_path / "nuts", tree), split="test")
    assert {sample.defect for sample in test.samples if sample.label} == kinds


# What flags say


FLAGS = [
    ("bottle 5; cable 4", {"good": ["bottle"]}, "5"),
    ("bottle 5; cable 4", {"good": ["bottle"], "bad": ["cable"]}, "4 1+4"),
    ("a/x#.png 5; a/y#.png 4", {"good": ["a/x*.png"], "bad": ["a/y*.png"]}, "4 1+4"),
    ("odd 5; strange 4; weird 1", {"good": ["odd", "strange"], "bad": ["weird"]}, "8 1+1"),
    ("odd 5; weird 2; !black 2", {"good": ["odd"], "bad": ["weird"], "masks": ["black"]}, "4 1+2 2"),
    ("images/a#.jpg 5; images/b#.jpg 2; !masks/b#.png 2", {"good": ["images/a*"], "bad": ["images/b*"]}, "4 1+2 2"),
    ("train/odd 5; test/odd 2; test/weird 1", {"good": ["*/odd"], "bad": ["*/weird"]}, "5 2+1"),
    ("good 5; bad 4", {"all_good": True}, "9"),
    ("#.png 5; !#_mask.png 2", {"all_good": True}, "7"),
    ("odd 5; odd/day 4; weird 2; a.txt = a", {"good": ["./odd/"], "bad": ["weird/*.png"]}, "8 1+2"),
    ("a/odd 5; b/c/odd 4; b/weird 2", {"good": ["**/odd"], "bad": ["**/weird"]}, "8 1+2"),
    ("odd 5; #.png 4", {"good": ["."]}, "9"),
    ("bottle 5; cable/day 4; labels.csv = 0.png,1", {"all_good": True}, "9"),
]


@pytest.mark.parametrize(("tree", "flags", "expected"), FLAGS)
def test_flags_say_what_names_do_not(tmp_path, tree, flags, expected):
    assert counts(plant(tmp_path / "nuts", tree), **flags) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"good": ["nuts"]}, "The glob 'nuts' finds no images"),
        ({"good": ["odd"], "bad": ["o*"]}, "odd/0.png is named by two of --good, --bad and --masks"),
        ({"good": ["a.txt"]}, "The glob 'a.txt' finds no images"),
        ({"good": [""]}, "The glob '' finds no images"),
        ({"good": ["/tmp"]}, "must be relative to the data folder"),
        ({"good": ["../*"]}, "must be relative to the data folder"),
        ({"good": ["odd"], "all_good": True}, "give it without good, bad and masks"),
        ({"good": ["odd"], "dataset_format": "mvtec"}, "good belong to dataset_format folder, got 'mvtec'"),
        ({"bad": ["odd"]}, "not clear which images"),
    ],
)
def test_flags_that_cannot_be_right(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(plant(tmp_path, "odd 5; strange 3; a.txt = a"), **flags)


# Words


@pytest.mark.parametrize(
    ("names", "quality"),
    [
        (
            "good OK i.O. nondefective NoDefects unbroken fehlerfrei in_Ordnung sin_defectos sem_defeito",
            "good",
        ),
        ("ng NOK n.ok not_ok notgood n.i.O. nicht_ok abnormal Mängel pas_bon non_conforme 不合格 비정상 crack", "bad"),
        ("good_and_bad OK_NG", "both"),
        ("camera1 2024-05-01 notable bottle pcb", None),
    ],
)
def test_words(names, quality):
    found = {name: meaning_of(name).quality for name in names.split()}
    assert found == dict.fromkeys(found, quality)


@pytest.mark.parametrize(
    ("label", "good"), [("OK", 1), ("NG", 0), ("Pass", 1), ("FAIL", 0), ("0", 1), ("1", 0), ("False", 1)]
)
def test_labels_of_the_hub_are_understood_by_the_same_words(label, good):
    assert is_good(label) == bool(good)


@pytest.mark.parametrize(
    ("stem", "image"),
    [
        ("a_mask", "a"),
        ("a-GT", "a"),
        ("mask_a", "a"),
        ("a_ground_truth", "a"),
        ("a_b", None),
        ("mask", None),
        ("a", None),
    ],
)
def test_names_of_masks(stem, image):
    assert mask_stem(stem) == image


# Pictures

SPOT = np.pad(np.ones((10, 12), np.uint8), ((20, 90), (9, 99)))
NOISE = np.random.default_rng(0).integers(90, 130, (120, 120), np.uint8)


@pytest.mark.parametrize(
    ("name", "pixels", "is_mask"),
    [
        ("a.png", SPOT * 255, True),
        ("a.png", SPOT, True),
        ("a.jpg", SPOT * 255, True),
        ("a.bmp", SPOT * 255, True),
        ("a.tif", SPOT.astype(np.uint16), True),
        ("a.tif", SPOT.astype(np.float32), True),
        ("a.png", SPOT[..., None] * np.array([128, 0, 0], np.uint8), True),
        ("a.png", SPOT + np.roll(SPOT, 40, 0) * 2 + np.roll(SPOT, 60, 0) * 3, True),
        ("a.png", SPOT * 0, False),
        ("a.png", 120 + SPOT * 100, False),
        ("a.png", NOISE, False),
        ("a.bmp", NOISE, False),
        ("a.jpg", NOISE * (1 - SPOT), False),
        ("a.tif", NOISE.astype(np.uint16) * 40, False),
    ],
)
def test_pictures_that_look_like_masks_are_known(tmp_path, name, pixels, is_mask):
    Image.fromarray(pixels).save(tmp_path / name)
    assert is_binary(tmp_path / name) == is_mask


# Files


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    plant(tmp_path / "elsewhere", "#.png 4")
    root = plant(tmp_path / "nuts", "#.png 2; day1 3")
    (root / "day2").symlink_to(tmp_path / "elsewhere")
    (root / "day1" / "again").symlink_to(root)
    (root / "a first").symlink_to(root / "day1")
    (root / "lost").symlink_to(tmp_path / "nowhere")
    (root / "up").symlink_to(tmp_path)
    listing = list_files(root)
    assert [path.parent.name for path in listing.images] == ["nuts"] * 2 + ["day1"] * 3 + ["day2"] * 4
    assert {reason: len(paths) for reason, paths in listing.left_out.items()} == {
        "links to a folder that is read already": 4,
        "broken links": 1,
    }
    assert counts(root) == "9"
    assert counts(root, good=["day?"]) == "7"


def test_a_link_that_tells_good_from_bad_is_not_lost(tmp_path):
    root = plant(tmp_path / "nuts", "day1 5; day2 3")
    (root / "NG").symlink_to(root / "day2")
    with pytest.raises(ValueError, match="the link NG tells good or bad of a folder that is read by another name"):
        load_dataset(root)


def test_good_images_of_a_test_folder_are_not_trained_on(tmp_path):
    root = plant(tmp_path / "nuts", "test/good 5; test/bad 3")
    assert len(load_dataset(root, split="test")) == 8
    with pytest.raises(ValueError, match="has no good images to train on: all lie in folders of tests"):
        load_dataset(root)


def test_linked_folders_of_a_known_layout_are_read(tmp_path):
    plant(tmp_path / "elsewhere", "#.png 3")
    root = plant(
        tmp_path / "data", "nut/train/good 1; nut/test/good/day 2; nut/test/dent/day 2; !nut/ground_truth/dent/day 2"
    )
    (root / "nut" / "train" / "good" / "link").symlink_to(tmp_path / "elsewhere")
    assert counts(root, dataset_format="mvtec") == "4 2+2 2"


FOREIGN = {
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": "thumbnails in @eadir",
    "day/.@__thumb/a.jpg": "thumbnails",
    "day/thumbs/a.jpg": "thumbnails",
    ".DS_Store": "hidden files",
    "day/._a.jpg": "hidden files",
    ".cache/a.jpg": "hidden files",
    "__MACOSX/day/a.jpg": "files of the system's",
    "Thumbs.db": "files of the system's",
    "desktop.ini": "files of the system's",
    "notes.txt": ".txt: no images",
    "a": "files without a suffix",
    "a.CR2": ".cr2: no format that is read (",
    "x.jpg/b.txt": ".txt: no images",
    "a.svg": ".svg: no format that is read (",
}


@pytest.mark.parametrize(("name", "reason"), FOREIGN.items())
def test_what_is_no_image_is_left_out_with_its_reason(tmp_path, name, reason):
    root = plant(tmp_path / "nuts", "day 2; #.JPG 1")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(BYTES[0, "jpg"] if Path(name).suffix == ".jpg" else b"neither")
    listing = list_files(root)
    assert len(listing.images) == 3 == len(load_dataset(root, all_good=True))
    assert [found for found in listing.left_out if found.startswith(reason)]


@pytest.mark.parametrize("name", "a.pgm a.PPM a.pnm a.gif a.jfif a.jpe a.dib a.webp a.TIFF a.bmp a.png".split())
def test_all_formats_that_are_decoded_are_listed(tmp_path, name):
    format = {".pgm": "PPM", ".ppm": "PPM", ".pnm": "PPM", ".jfif": "JPEG", ".jpe": "JPEG", ".dib": "BMP"}
    suffix = Path(name).suffix.lower()
    (tmp_path / name).write_bytes(encode(PHOTO, format.get(suffix, suffix[1:])))
    (image,) = load_dataset(tmp_path).samples
    assert decode(image.image).size == (8, 8)


def test_a_phones_pictures_are_listed_only_where_they_can_be_read(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    listing = list_files(plant(tmp_path, "#.png 1"))
    if importlib.util.find_spec("pillow_heif"):
        assert len(listing.images) == 2
    else:
        assert list(listing.left_out) == [".heic: need pillow-heif, pip install pillow-heif"]


# The summary


def test_the_summary_tells_what_was_read_as_what(tmp_path):
    root = plant(tmp_path / "nuts", "train/good 4; test/good 1; test/dent 2; !ground_truth/dent 1; validation/good 3")
    (root / "notes.txt").write_text("dull")
    Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 999).save(root / "train" / "good" / "deep.png")
    summary = summarise({split: load_dataset(root, split=split) for split in ("train", "test")}, root)
    assert summary.roles == {
        ("train, good", "train/good"): 5,
        ("test, good", "test/good"): 1,
        ("test, dent", "test/dent"): 2,
    }
    assert summary.masks == (1, 1) and summary.num_looked_at == 8
    assert summary.sizes == {(8, 8): 7, (10, 6): 1} and summary.pixels == {"8-bit colour": 7, "16-bit grey": 1}
    assert summary.left_out == {
        ".txt: no images": 1,
        "images of no split or category asked for, or masks of no defect, in validation/good": 3,
    }
    text, markdown = summary.to_text(), summary.to_markdown()
    assert "5  train, good  train/good" in text and "| 2 | test, dent | `test/dent` |" in markdown
    for line in (
        "Masks: 1 of 2 defects have a file",
        "Size: 8 x 8 pixels in 7 images, 2 sizes in all",
        "Range: values up to 58,941, as of 16 bits, in 16-bit pictures.",
        "Left out: .txt: no images (1)",
    ):
        assert line in text and line in markdown
    assert str(tmp_path) not in text + markdown


def test_the_summary_names_what_cannot_be_read_and_what_the_numbers_of_12_bits_mean(tmp_path):
    root = plant(tmp_path / "nuts", "#.png 2")
    (root / "torn.png").write_bytes(b"no image")
    Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 66).save(root / "deep.tif")
    summary = replace(summarise({"train": load_dataset(root)}, root), pixel_range=(0, 4095), notes=["And this."])
    told = summary.to_text()
    assert summary.num_looked_at == 3 and "Unreadable: 1 of the images looked at, such as torn.png." in told
    assert "Range: values up to 3,894, as of 12 bits, in 16-bit pictures; 0 is black, 4,095 white." in told
    assert told.endswith("\n  And this.") and "- And this." in summary.to_markdown()


@pytest.mark.parametrize("suffix", [".heic", ".tif"])
def test_pictures_that_pillow_does_not_know_are_described(tmp_path, suffix):
    path, colours = tmp_path / f"a{suffix}", np.zeros((6, 10, 3), np.float32)
    if suffix == ".tif":
        pytest.importorskip("tifffile").imwrite(path, colours, photometric="rgb")
    else:
        pytest.importorskip("pillow_heif").from_pillow(Image.new("RGB", (10, 6))).save(path)
    assert describe(path) == f"10 x 6 pixels, {'float' if suffix == '.tif' else '8-bit'} colour"


def test_a_folder_of_pictures_that_need_an_extra_names_it(tmp_path, monkeypatch):
    for module in ("rad.data.listing", "rad.data"):
        monkeypatch.setattr(f"{module}.IMAGE_SUFFIXES", (".png",))
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"left out: .heic: need pillow-heif, pip install pillow-heif \(1\)"):
        load_dataset(tmp_path)


def test_the_summary_of_many_images_looks_at_some(tmp_path, monkeypatch):
    root = plant(tmp_path / "nuts", "#.png 30")
    monkeypatch.setattr("rad.data.summary.MAX_HEADERS", 10)
    summary = summarise({"train": load_dataset(root)}, root)
    assert summary.num_looked_at == 10 and "8 x 8 pixels (of 10 images looked at)" in summary.to_text()


def dry_run(script: str, root: Path, *flags: str) -> None:
    module, folder = importlib.import_module(script), "--train_data_dir" if script == "train" else "--data_dir"
    out = root.parent / "out"
    try:
        module.main(module.parse_args([folder, str(root), "--output_dir", str(out), "--dry_run", *flags]))
    finally:
        assert not out.exists()


def vary(folder: Path, high: int = 256, dtype: type = np.uint8) -> None:
    """Makes the pictures of a folder different ones."""
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        Image.fromarray(rng.integers(0, high, (8, 8), dtype)).save(path)


@pytest.mark.parametrize("script", ["train", "evaluate", "compare", "ablate"])
def test_a_dry_run_tells_what_is_read_and_stops(tmp_path, script, capsys, caplog):
    root = plant(tmp_path / "nuts", "odd 15; weird 2")
    vary(root / "odd")
    with pytest.raises(ValueError, match="not clear which images"):
        dry_run(script, root)
    with caplog.at_level("INFO"):
        dry_run(script, root, "--good", "odd", "--bad", "weird")
    told = capsys.readouterr().out + caplog.text  # where the program logs to standard output
    assert "12  train, good" in told and "2  test, weird" in told
    assert "0 of 2 defective images have a mask that is used, 2 none." in told


def test_a_dry_run_of_training_checks_what_training_does(tmp_path, caplog):
    root = plant(tmp_path / "nuts", "good 15; bad 2")
    with pytest.raises(ValueError, match="has 12 good images, 11 of which are copies of others"):
        dry_run("train", root)
    vary(root / "good")
    with pytest.raises(ValueError, match="has 4 good images to train on; it needs at least 10"):
        dry_run("train", root, "--max_train_samples", "4")
    vary(root / "good", 4096, np.uint16)
    with caplog.at_level("INFO"):
        dry_run("train", root)
    assert "Pixels of 16-bit images are read as 0 to 4,095" in caplog.text
    assert "bad/1.png has 8-bit pixels with values up to 249, but this model knows" in caplog.text
