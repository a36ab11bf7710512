"""What the names of folders, files and labels mean: good or bad, train or test, mask.

Case, accents and separators do not count, words may stand together ("NoDefect", "test_good"), and negations turn them
round ("non_defective", "not ok", "defect-free"). What no word here says is unknown, and left to who reads it.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

_GOOD = """good goods ok okay pass passed passes normal normals normality healthy clean intact perfect flawless
    faultless defectless correct accept accepted acceptable conform conforming undamaged unbroken golden
    free nominal valide io gut gute guter gutes gutteil gutteile fehlerfrei fehlerlos mangelfrei
    einwandfrei defektfrei ordnung bon bons bonne bonnes conforme conformes sain saine bueno buenos buena
    buenas correcto correctos aprobado aprobados sano buono buoni buona buone corretto corretti sano
    integro bom boa bons boas aprovado aprovados perfeito normais"""
_BAD = """bad ng nok nio ko def fail failed failing fails failure failures faulty fault faults defect defects
    defective defectives defected abnormal abnormals abnormality abnormalities anomaly anomalies
    anomalous anomal reject rejects rejected rejection damaged damage damages broken outlier outliers
    scrap nonconforming unacceptable inacceptable inaceptable unhealthy incorrect incorrecto incorrectos incorreto
    inconforme inconformes invalid wrong error errors schlecht schlechte schlechter
    schlechtteil schlechtteile fehler fehlerhaft fehlerhafte defekt defekte ausschuss mangel maengel
    mangelhaft anomalie anomalien mauvais mauvaise mauvaises defaut defauts defectueux defectueuse rebut
    rebuts anormal anormaux malo malos mala malas defecto defectos defectuoso defectuosos defectuosa
    rechazado rechazados anomalia anomalias difetto difetti difettoso difettosi difettosa scarto scarti
    cattivo cattivi anomalo ruim ruins defeito defeitos defeituoso defeituosos defeituosa reprovado
    reprovados rejeitado"""
_KINDS = """scratch scratches scratched dent dents dented crack cracks cracked hole holes stain stains contamination
    missing bent chip chips chipped burr burrs rust corrosion pit pits pitting bubble bubbles scuff tear
    torn squeezed misprint blowhole fray uneven kratzer riss risse delle beule rayure rayures fissure
    aranazo grieta graffio graffi crepa risco trinca"""
_NEGATIONS = """no non not without un nicht kein keine keinen ohne sans pas sin senza sem nao zero
    never nie niemals isnt
    wasnt doesnt didnt less weniger"""
_AFTER = "free frei less libre なし 無し 없음"  # "defect free"
_TRAIN = """train training trainset fit learn learning traindata trainingsdaten lernen entrainement apprentissage
    entrenamiento addestramento treino treinamento"""
_TEST = """test testing tests testset testdata testdaten eval evaluation holdout inference pruefung prufung essai
    prueba pruebas prova teste testes"""
_VALIDATION = "val valid validation dev validierung validacion validazione validacao"
_MASK = """mask masks groundtruth gt gts label labels lbl lbls annotation annotations annot annots anno seg segm
    segmentation segmentations segmentationclass truth maske masken masque masques mascara mascaras maschera maschere
    etiqueta etiquetas etichetta etichette"""
_IMAGE = """image images img imgs photo photos picture pictures pic pics data dataset rgb input inputs original
    originals raw jpegimages bild bilder imagen imagenes immagine immagini imagem imagens foto fotos
    png jpg jpeg bmp tif tiff webp new neuer nuova nueva nouveau all dcim dsc dscn dscf pxl mvimg whatsapp copy
    kopie copia frame frames"""
_ASIDE = """unsure unclear uncertain borderline ignore ignored trash discard discarded unknown unlabeled
    unlabelled unsorted misc todo sort check review maybe doubtful suspect pending old backup backups archive
    reference references template templates screenshot screenshots depth xyz pointcloud heatmap heatmaps
    overlay overlays annotated pred preds prediction predictions visualization visualizations result results
    output outputs augmented augmentation processed unklar unbekannt alt false fp fn pseudo missed escape escapes
    overkill almost nearly semi hardly conditional conditionally bedingt grenz grenzwertig limit rework reworked
    nacharbeit repaired concession fake calibration calib flatfield darkframe darkframes preview previews crops cropped
    resized duplicate duplicates blurry blurred empty background backgrounds normalmap normalmaps albedo vis"""
_WEAK = "check sort old alt todo pending archive limit empty"  # words that mean nothing in the name of a file
_PLACES = """camera cameras cam cams view views kamera side left right top bottom front back rear batch batches lot
    lots charge los part parts teil teile sample samples set sets session sessions day shift line station
    machine week month year date serial light exposure position pos angle run runs series group section
    folder dir directory tray number nr monday tuesday wednesday thursday friday saturday sunday january
    february march april may june july august september october november december jan feb mar apr jun jul
    aug sep oct nov dec montag dienstag mittwoch donnerstag freitag samstag sonntag tag woche schicht
    linie latest row rows col cols column columns tile tiles scan scans station nest cavity operator up down inner
    outer north south east west lote lotes lotto partie piece pieces pieza piezas pezzo pezzi peca pecas jour dia
    giorno turno
    vue vista links rechts oben unten vorne hinten vorderseite rueckseite ruckseite mai juni juli oktober
    dezember marz maerz januar februar kw sn id ordner canon nikon apple msdcf
    has is true of from the and in at et und de la mit with"""
_WORDS = {
    **dict.fromkeys(f"{_PLACES} {_IMAGE}".split(), "plain"),
    **dict.fromkeys(_ASIDE.split(), "aside"),
    **dict.fromkeys(_TRAIN.split(), "train"),
    **dict.fromkeys(_TEST.split(), "test"),
    **dict.fromkeys(_VALIDATION.split(), "validation"),
    **dict.fromkeys(_MASK.split(), "mask"),
    **dict.fromkeys(_GOOD.split(), "good"),
    **dict.fromkeys(_BAD.split(), "bad"),
    **dict.fromkeys(_KINDS.split(), "kind"),
    **dict.fromkeys(_NEGATIONS.split(), "not"),
    "ground": "ground",  # ground truth
}
_ASIAN = {  # written without spaces: found anywhere, the longest first
    "good": "良品 良好 合格 正常 양품 양호 정상 합격 무결함 好 なし 無し 없음",
    "bad": """不良品 不良 不合格 不正常 非正常
        非良品 非合格 未合格 良品でない 미합격 비양품
        异常 異常 缺陷 瑕疵 次品 废品 廢品 欠陥 不具合 비정상 불량품 불량 이상
        불합격 결함 坏""",
    "kind": "划痕 裂纹 刮痕 傷 キズ 스크래치",
    "not": "没有 沒有 无 無",
    "train": "训练 訓練 学習 學習 학습 훈련",
    "test": "测试 測試 テスト 評価 检验 테스트 시험 평가",
    "validation": "验证 驗證 検証 검증",
    "mask": "掩码 掩膜 掩模 标注 標註 标签 遮罩 マスク ラベル 正解 마스크 라벨 정답",
    "plain": "图像 图片 照片 圖像 画像 写真 이미지 사진 相机 批次 카메라 品 有 あり 있음",
}
_ASIAN_WORDS = {word: role for role, words in _ASIAN.items() for word in words.split()}
_ASIAN_PATTERN = re.compile(f"({'|'.join(sorted(_ASIAN_WORDS, key=len, reverse=True))})")


_SPELLINGS = (  # as words are written with separators, and what they say then
    (r"(?<![^\W_])n[-_. ]?i[-_. ]o(?![^\W\d_])[.]?", "nio"),  # nicht in Ordnung
    (r"(?<![^\W_])i[.]o(?![^\W\d_])[.]?", "io"),
    (r"(?<![^\W_])n[-_. /]?io(?![^\W\d_])", "nio"),
    (r"(?<![^\W_])n[-_. /]?ok(?![^\W\d_])", "nok"),
    (r"(?<![^\W_])k[.]o(?![^\W\d_])[.]?", "ko"),
    (r"(?<![^\W_])ab[-_ ]normal", "abnormal"),
    (r"(normal|dark)[-_ ](maps?|frames?)(?![^\W\d_])", r"\1\2"),
    (r"(?<![^\W_])free[-_ ](of|from)(?![^\W\d_])", "no"),
    (r"(?<=[^\W\d_])[-_ ](less|frei|los)(?![^\W_])", r"\1"),
    (r"^(.+)(=0|[=_ -]false|[-_ .](not|nicht))$", r"not \1"),  # "is_good=0"
)


@dataclass(frozen=True)
class Meaning:
    """What a name says.

    Attributes:
        quality: "good", "bad", "both" where it says both, or None.
        kind: Whether what it calls bad is a kind of defect, such as "scratch".
        split: "train", "test", "validation" or None.
        mask: It is of masks or other labels.
        aside: It is of images that are neither good nor bad, such as those not looked at yet, or no photos at all.
        unknown: Some of it is not understood.
    """

    quality: str | None = None
    kind: bool = False
    split: str | None = None
    mask: bool = False
    aside: bool = False
    unknown: bool = False


@cache
def meaning_of(name: str) -> Meaning:
    """What a folder's, a label's or a file's name says, a file's without its suffix."""
    roles, qualities = _roles(name), []
    for i, role in enumerate(roles):
        before, after = roles[:i], roles[i + 1 : i + 2]
        if role in ("good", "bad", "kind"):
            if role == "good" and roles[i - 1 : i] and roles[i - 1] in ("bad", "kind") and _is_free(name):
                continue  # the "free" of "defect free"
            turned = "not" in before or (role != "good" and after == ["good"] and _is_free(name))
            qualities.append(("bad" if role == "good" else "good") if turned else "good" if role == "good" else role)
    found = {"good" if quality == "good" else "bad" for quality in qualities}
    splits = [role for role in roles if role in ("train", "test", "validation")]
    return Meaning(
        quality="both" if len(found) > 1 else next(iter(found), None),
        kind="kind" in qualities,
        split=splits[-1] if splits else None,
        mask="mask" in roles,
        aside="aside" in roles,
        unknown="unknown" in roles or (not found and ("not" in roles or roles == ["ground"])),
    )


def says_no_photo(stem: str) -> bool:
    """Whether a file's name says that it is no photograph of a part, or of one that nobody has decided on: a mask, a
    heatmap, "unsure"."""
    tokens = [token for token in re.findall(r"[^\W\d_]+", _latin(stem)) if token not in _WEAK.split()]
    meaning = meaning_of("_".join(tokens)) if tokens else Meaning()
    return meaning.mask or meaning.aside


def is_good(label: str) -> bool:
    """Whether a label, as text, is that of good images: a word that means so, 0 or False."""
    return label.lower() in ("0", "0.0", "false") or meaning_of(label).quality == "good"


def mask_stem(stem: str) -> str | None:
    """The name of the image that a mask's name bears: "a" of "a_mask", "mask_a" or "a-GT"; None for other names."""
    parts = re.split(r"([-_. ])", stem)
    for words, rest in ((parts[-3:], parts[:-4]), (parts[-1:], parts[:-2]), (parts[:1], parts[2:])):
        roles = [_WORDS.get(_latin(part)) or _ASIAN_WORDS.get(part) for part in words if part not in "-_. "]
        if rest and roles and set(roles) <= {"mask", "ground"}:
            return "".join(rest)
    return None


def part_name(stem: str) -> str:
    """An image's name without the word of a picture or of good or bad that it begins or ends with: "3" of "image_3"
    and of "3_NG"."""
    parts = re.split(r"([-_. ])", stem)
    for word, rest in ((parts[0], parts[2:]), (parts[-1], parts[:-2])):
        if rest and (_latin(word) in _IMAGE.split() or meaning_of(word).quality):
            return "".join(rest)
    return stem


def _latin(text: str) -> str:
    """Lower case without accents."""
    text = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in text if not unicodedata.combining(c))


def _is_free(name: str) -> bool:
    return any(word in _latin(name) or word in name for word in _AFTER.split())


def _roles(name: str) -> list[str]:
    """The roles of the words of a name, in order."""
    text = unicodedata.normalize("NFKC", name)
    for pattern, meant in _SPELLINGS:
        text = re.sub(pattern, meant, text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=[a-z]{2})(?=[A-Z]([a-z]|\b|_|\d))", " ", text)
    roles = []
    for part in _ASIAN_PATTERN.split(text):
        if part in _ASIAN_WORDS:
            roles.append(_ASIAN_WORDS[part])
        else:
            tokens = re.findall(r"[^\W\d_]+", _latin(part))
            roles += [role for token in tokens if len(token) > 1 for role in _split(token)]
    return roles or (["unknown"] if re.fullmatch(r"[^\W\d_]", text) else [])


@cache
def _split(token: str) -> list[str]:
    """The roles of words that stand together, of as few words as can be; ["unknown"] if they are not all known."""
    best: list[list[str] | None] = [[]]
    for end in range(1, len(token) + 1):
        options = []
        for start in range(end):
            role = _WORDS.get(token[start:end]) or ("good" if token[start:end] in _AFTER.split() and start else None)
            head = best[start]
            if role and head is not None:
                options.append([*head, role])
        best.append(min(reversed(options), key=len) if options else None)  # "non ok", not "no nok"
    return best[-1] or ["unknown"]
