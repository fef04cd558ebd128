"""Names that mean something in MediaWiki's markup: namespaces, languages, tags, templates."""

from __future__ import annotations

# A link into one of these namespaces is a picture, a sound or a category, never a word of the
# sentence. Names as MediaWiki localises them (its languages/messages files), in lower case. A dump
# names its own in <siteinfo>; these serve markup that comes without.
DROPPED_NAMESPACES = frozenset(
    """
file image media category
datei bild medium kategorie
fichier média catégorie
archivo imagen medio categoría
immagine categoria ficheiro imagem arquivo multimédia multimedia fitxer imatge
файл изображение медиа категория картинка медия файлове зображення медіа категорія датотека слика
bestand afbeelding categorie plik grafika kategoria soubor soubory kategorie súbor kategória
fil bilde kategori tiedosto kuva luokka fájl kép kategória fișier imagine categorie
αρχείο εικόνα κατηγορία μέσο dosya resim ortam kategorija slika datoteka vaizdas attēls pilt
kategooria skrá mynd flokkur íomhá catagóir delwedd categori fitxategi irudi kategoria
תמונה קובץ קטגוריה מדיה ملف صورة تصنيف وسائط پرونده تصویر رده رسانه فائل زمرہ
चित्र श्रेणी मीडिया चित्र वर्ग চিত্র বিষয়শ্রেণী படிமம் பகுப்பு దస్త్రం వర్గం ไฟล์ ภาพ หมวดหมู่
ファイル 画像 カテゴリ メディア 文件 档案 檔案 图像 圖像 分类 分類 媒体 媒體 파일 그림 분류 미디어
berkas gambar kategori tập_tin hình thể_loại պատկեր կատեգորիա ფაილი სურათი კატეგორია
""".replace("_", " ").split()
) | {"tập tin", "thể loại"}

# Wikipedia's language codes: [[fr:Titre]] links the same article elsewhere and shows nothing.
LANGUAGES = frozenset(
    """
aa ab ace af ak als am an ang ar arc arz as ast av ay az azb ba bar bat-smg bcl be be-tarask
be-x-old bg bh bi bjn bm bn bo bpy br bs bug bxr ca cbk-zam cdo ce ceb ch cho chr chy ckb co cr crh
cs csb cu cv cy da de diq dsb dv dz ee el eml en eo es et eu ext fa ff fi fiu-vro fj fo fr frp frr
fur fy ga gag gan gd gl glk gn gom got gu gv ha hak haw he hi hif ho hr hsb ht hu hy hz ia id ie ig
ii ik ilo io is it iu ja jbo jv ka kaa kab kbd kg ki kj kk kl km kn ko koi kr krc ks ksh ku kv kw
ky la lad lb lbe lez lg li lij lmo ln lo lrc lt ltg lv mai map-bms mdf mg mh mhr mi min mk ml mn mo
mr mrj ms mt mus mwl my myv mzn na nah nan nap nds nds-nl ne new ng nl nn no nov nrm nso nv ny oc
om or os pa pag pam pap pcd pdc pfl pi pih pl pms pnb pnt ps pt qu rm rmy rn ro roa-rup roa-tara ru
rue rw sa sah sc scn sco sd se sg sh si simple sk sl sm sn so sq sr srn ss st stq su sv sw szl ta
te tet tg th ti tk tl tn to tpi tr ts tt tum tw ty tyv udm ug uk ur uz ve vec vep vi vls vo wa war
wo wuu xal xh xmf yi yo yue za zea zh zh-classical zh-min-nan zh-yue zu
""".split()
)

# Tags whose content is no text of the article, or no text at all.
OPAQUE_TAGS = (
    *("ref", "references", "gallery", "math", "chem", "ce", "timeline", "syntaxhighlight"),
    *("source", "pre", "score", "graph", "hiero", "templatedata", "imagemap", "mapframe"),
    *("maplink", "inputbox", "categorytree", "indicator", "templatestyles", "includeonly"),
    *("section", "charinsert", "dynamicpagelist", "quiz", "rss", "phonos", "style", "script"),
)
# Tags that begin a new line; all others leave no trace.
BLOCK_TAGS = (
    *("p", "br", "hr", "div", "center", "blockquote", "poem", "ul", "ol", "li", "dl", "dt", "dd"),
    *("tr", "td", "th", "caption", "h1", "h2", "h3", "h4", "h5", "h6"),
)

# Templates that are part of a sentence, by what they show: a value counted from 1 is one of their
# unnamed arguments, -1 the last one.
SHOWN_ARGUMENT = {
    **dict.fromkeys(
        (
            *("nowrap", "nobr", "nobreak", "small", "smaller", "big", "larger", "em", "strong"),
            *("sc", "smallcaps", "sub", "sup", "mvar", "var", "code", "mono", "kbd", "samp"),
            *("abbr", "abbrlink", "tooltip", "ill", "interlanguage link", "quote", "blockquote"),
            *("cquote", "quotation", "quote box", "visible anchor", "vanchor", "not a typo"),
            *("as written", "sic", "text", "noitalic", "title", "bquote", "formatnum", "unicode"),
            *("ipa", "angbr", "angle bracket", "keypress", "key press", "flag", "flagcountry"),
            *("ship", "sclass", "isbn", "gaps", "number", "num", "nombre", "unité", "unite"),
        ),
        1,
    ),
    **dict.fromkeys(("lang", "transl", "transliteration", "font color", "color", "colour"), -1),
}
# Templates that show the same characters always.
SHOWN_TEXT = {
    **dict.fromkeys(("spaced ndash", "snd", "spnd", "spaced en dash", "ndash", "en dash"), " – "),
    **dict.fromkeys(("mdash", "em dash", "spaced mdash", "spaced em dash"), " — "),
    **dict.fromkeys(("nbsp", "space", "thinsp", "spaces", "nnbsp"), " "),
    **dict.fromkeys(("·", "•", "dot", "bull", "middot", "bullet"), " · "),
    **dict.fromkeys(("circa", "c.", "ca."), "c. "),
    **{"'": "'", "'s": "'s", "-": " ", "pi": "π", "=": "=", "!": "|", "–": " – "},
}
