"""Bad input: one clear line on stderr and exit code 2. Every refusal of the command line that needs no more than flags
and a few files is a row here: what is given, and the words that the line must have.

`{tmp}` in a value is a folder of the test's own, see `files`; a refusal leaves every file in it as it was.
"""

import shlex
import shutil

import pytest
import torch
from helpers import refusal, small_network, write_model, write_noise
from PIL import Image

TEST = "--gpu_no -1 --load_path {tmp}/model.pth --content {tmp}/a.png --style {tmp}/b.png --save_path {tmp}/out.png "
MEASURED = TEST + "--save_path {tmp}/out --metrics ssim "
FOLDERS = "--content_dir {tmp}/content --style_dir {tmp}/style --save_path {tmp}/out "
TRAIN = "--gpu_no -1 --vgg_weights random --imsize 40 --cropsize 32 --batch_size 2 --num_workers 0 " + FOLDERS
DISTILL = "--gpu_no -1 --teacher {tmp}/model.pth --load_path {tmp}/model.pth " + FOLDERS
PRUNE = "--gpu_no -1 --load_path {tmp}/model.pth --imsize 32 --cropsize 32 --prune_nums 0 " + FOLDERS

# A row: mode, flags ("--imsize 0 --save_path {tmp}/out"), words that the line must have.
COMMAND_LINE = (
    ("paint", "", "argument --mode: invalid choice: 'paint'"),
    ("prune_eval", "--view_strength 1", "unrecognized arguments: --view_strength 1 (see python main.py --mode prune "),
    ("test", TEST + "--load_pat x", "unrecognized arguments: --load_pat x"),
    ("test", TEST + "--swap_max_pool x", "unrecognized arguments: x"),
    ("prune", PRUNE + "--content {tmp}/a.png {tmp}/b.png", "unrecognized arguments: {tmp}/b.png"),
    ("train", "", "--content_dir is needed in train mode"),
    ("train", "--seed 18446744073709551616", "got 18446744073709551616, a whole number from 0 to 18446744073709551615"),
    *((mode, flags + f"--{flag} ''", f"argument --{flag}: got nothing; a value is needed, or leave the flag out")
      for mode, flags, names in (("test", TEST, ("style", "load_path", "vgg_weights")), ("prune", PRUNE, ("content",)),
                                 ("train", TRAIN, ("load_path", "content_dir", "cache_dir"))) for flag in names),
    ("test", TEST + "--style_strength 1.5", "--style_strength: got 1.5, a number from 0 to 1 is needed"),
    ("test", TEST + "--imsize 0", "--imsize: got 0, a whole number from 1 to 1000000000000 is needed"),
    ("test", TEST + f"--imsize {'9' * 5000}", f"--imsize: got {'9' * 50}..., a whole number from 1"),
    ("train", TRAIN + "--load_path {tmp}/model.pth --max_iter 1 --cropsize 1000000000000", "memory is too small for"),
    ("train", TRAIN + "--num_workers 1025", "--num_workers: got 1025, a whole number from 0 to 1024"),
    ("train", TRAIN + "--lr -1e-5", "--lr: got -1e-5, a number, 0 or more, is needed"),
    ("train", TRAIN + "--seed -1e400", "--seed: got -1e400, a whole number from 0 to"),
    ("test", TEST + "--cropsize large", "--cropsize: got large"),
    ("test", TEST + "--amp bf16", "--amp: invalid choice: 'bf16'"),
    ("test", TEST + "--gpu_no 99", "--gpu_no 99: this machine has"),
    ("test", TEST + "--gpu_no -2", ("--gpu_no -2: this machine has", "-1 is the CPU")),
    ("test", TEST + "--backbone vgg16", "--backbone vgg16"),
    ("test", TEST + "--max_pixels 100", ("--style {tmp}/b.png", "--max_pixels 100")),
    ("test", TEST + "--content {tmp}/content", "--save_path {tmp}/out.png: one file cannot hold"),
    ("test", TEST + "--content {tmp}/content --save_path {tmp}/text.jpg/out", "--save_path {tmp}/text.jpg/out"),
    ("test", TEST + "--content {tmp}/content --save_path {tmp}/text", ("--save_path {tmp}/text", "folder is needed")),
    ("test", TEST + "--content {tmp}/content --save_path {tmp}/out --holdout 1e-9",
     "--holdout 1e-09 holds none of its 2 pictures out"),
    *(("test", TEST + f"--load_path {{tmp}}/{name}", f"--load_path {{tmp}}/{name}")
      for name in ("text", "empty.pth", "cut.pth", "other.pth", "tensor.pth", "folder", "missing.pth")),
    *(("test", TEST + f"--{flag} {{tmp}}/{name}", f"--{flag} {{tmp}}/{name}")
      for flag in ("content", "style") for name in ("text.jpg", "empty.jpg", "cut.png", "missing.jpg")),
    ("train", TRAIN + "--encoder_lr 0 --decoder_lr 0", "both parts are frozen"),
    ("train", TRAIN + "--adain_levels 5", "--adain_levels 5: vgg19 has 1 to 4"),
    ("distill", DISTILL + "--adain_levels 0", "--adain_levels: got 0, a whole number from 1 to"),
    ("train", TRAIN + "--adain_levels 2 --compact_layers all", "--compact_layers all: this network adds features"),
    ("train", TRAIN + "--lr inf", "--lr: got inf"),
    ("train", TRAIN + "--l0_eps 0", "--l0_eps: got 0, a number above 0 or relative:NUMBER is needed"),
    ("train", TRAIN + "--resume always", "--resume: invalid choice: 'always'"),
    ("train", TRAIN + "--content_dir {tmp}/none", "--content_dir {tmp}/none: no such folder"),
    ("train", TRAIN + "--vgg_weights {tmp}/none.pth", "--vgg_weights {tmp}/none.pth: no such file"),
    ("train", TRAIN + "--vgg_weights bundled --backbone vgg16", "not for vgg16"),
    ("train", TRAIN + "--content_dir {tmp}/folder", ("--content_dir {tmp}/folder", "no picture in it")),
    ("train", TRAIN + "--style_dir {tmp}/broken", ("--style_dir {tmp}/broken", "1 of 1 pictures")),
    ("train", TRAIN + "--content_dir {tmp}/some --load_path {tmp}/model.pth --max_iter 9",
     ("--content_dir {tmp}/some", "1 of 9 pictures")),
    ("distill", "--holdout 1 " + FOLDERS, "--holdout: got 1, a number from 0 to 0.9 is needed"),
    ("prune", PRUNE + "--prune_num 6", "--prune_num 6: the network has 6 bottleneck channels, at most 5"),
    ("prune", PRUNE + "--prune_channels 3 6", "channel 6"),
    ("prune", PRUNE + "--prune_channels 3 3", "more than once"),
    ("prune", PRUNE + "--prune_num 3 --prune_channels 3", "give one of the two"),
    ("prune", PRUNE + "--prune_nums 0 600", "--prune_nums 600"),
    ("prune", PRUNE + "--backbone vgg16", "--backbone vgg16"),
    ("prune", PRUNE + "--content {tmp}/none.jpg", "{tmp}/none.jpg"),
    ("prune", PRUNE + "--responses {tmp}/none.npz", "{tmp}/none.npz"),
)

TRAINING = (
    *(("train", TRAIN + flags, words) for flags, words in (
        ("--cropsize 20", "--cropsize 20: a multiple of 8, 16 or more"),
        ("--new_weights", "--load_path says"),
        ("--new_weights --load_path {tmp}/model.pth --encoder_lr 0", "random weights of a frozen part"),
        ("--swap_max_pool --pooling blur", ("--swap_max_pool", "--pooling blur")),
        ("--lr 0", "both parts are frozen"),
        ("--backbone vgg16 --load_path {tmp}/model.pth", "--backbone vgg16: {tmp}/model.pth is a vgg19 network"),
        ("--resume", "check_point.pth is not there"),
        ("--target_macs 0.5 --channel_loss_weight 0 --compact_layers all", "--channel_loss_weight is 0"),
        ("--target_macs 0.005 --compact_layers all", "takes this network from 1.000 to 0.011 of"),  # a tenth stays on
        ("--target_macs 1.0", "argument --target_macs: got 1.0, a number between 0 and 1"),
        ("--target_macs 0.5", "--compact_layers bottleneck takes this network from 1.000 to 0.9"),
        ("--target_macs 0.5 --compact_layers all --load_path {tmp}/model.pth", "this network from 0.0"),
        ("--compact_layers encoder --encoder_lr 0", "--compact_layers encoder with --encoder_lr 0"),
        ("--encoder_layers bottleneck --encoder_lr 0", "--encoder_layers bottleneck with --encoder_lr 0: no layer"),
        ("--encoder_layers bottleneck --compact_layers all", "--encoder_layers bottleneck with --compact_layers all"),
        ("--encoder_layers bottleneck --new_weights --load_path {tmp}/model.pth", "random weights of a frozen part"),
        ("--compact_layers all --decoder_lr 0", "--compact_layers all with --decoder_lr 0"),
        ("--target_macs 0.95 --encoder_lr 0", "--compact_layers bottleneck with --encoder_lr 0"),
        ("--compact_layers decoder --batch_size 1", "--compact_layers decoder with --batch_size 1"),
        ("--compact_cost params", "argument --compact_cost"),
    )),
    *(("distill", DISTILL + flags, words) for flags, words in (
        ("--cropsize 36", "--cropsize 36: a multiple of 8"),
        ("--batch_size 1", "2 or more are needed"),
        ("--teacher {tmp}/none.pth", "--teacher {tmp}/none.pth: no such file"),
        ("--teacher {tmp}/vgg16.pth", "--teacher {tmp}/vgg16.pth is a vgg16 network"),
        ("--teacher {tmp}", "--teacher {tmp}: the folder holds neither"),
        ("--load_path {tmp}/none.pth", "--load_path {tmp}/none.pth: no such file"),
        ("--resume", "check_point.pth is not there"),
    )),
    ("distill", "--teacher a.pth --load_path a.pth --save_path {tmp}/run", "--content_dir or --style_dir is needed"),
)

IN_TWO = TEST + "--style {tmp}/a.png {tmp}/b.png "
PAINTING = (
    *(("test", TEST + f"--{flag} {value}", f"--{flag}: got")
      for flag, value in (*(("frame_rate", each) for each in ("0", "1/0", "nan", "2000", "1e99999999")), ("pairs", "0"),
                          ("temporal_smoothing", "1"), ("temporal_smoothing", "-0.1"))),
    ("test", TEST + "--metrics psnr", "--metrics: invalid choice: 'psnr'"),
    ("test", TEST + "--metrics ssim", "--save_path {tmp}/out.png: one file cannot hold"),
    ("test", MEASURED + "--metrics style --vgg_weights {tmp}/none.pth", "{tmp}/none.pth: no such file"),
    ("test", MEASURED + "--skip_existing", "--skip_existing: --metrics measures"),
    ("test", TEST + "--painted a={tmp}/content", "--painted: what others painted is measured only"),
    ("test", MEASURED + "--painted {tmp}/content", "NAME=FOLDER is needed"),
    ("test", MEASURED + "--painted a={tmp}/none", "--painted {tmp}/none: no such folder"),
    ("test", MEASURED + "--painted a={tmp}/content", "--painted a={tmp}/content: 0 pictures are called a_b or a__b"),
    ("test", TEST + "--pairs 3 --save_path {tmp}/out/", "--pairs 3: 1 content and 1 style pictures make 1 pairs"),
    ("test", TEST + "--style_strength 0.5 1 0.5", "--style_strength 0.5 1 0.5: one is given twice"),
    ("test", TEST + "--style_strength 0 -0.0", "--style_strength 0 0: one is given twice"),
    ("test", TEST + "--load_path {tmp}/model.pth {tmp}/model.pth --save_path {tmp}/out", "this model is named twice"),
    ("test", TEST + "--content_dir {tmp}/content --save_path {tmp}/out", "--content and --content_dir mean the same"),
    ("test", TEST + "--content {tmp}/broken --save_path {tmp}/out",
     "none of 1 pairs can be painted: --content {tmp}/broken/a.jpg: not a"),
    ("test", TEST + "--save_path {tmp}/out.gif", "--save_path {tmp}/out.gif: no picture format"),
    ("train", TRAIN + "--load_path {tmp}/model.pth {tmp}/model.pth", "unrecognized arguments: {tmp}/model.pth"),
    ("test", IN_TWO + "--style_weights 0.7", "--style_weights 0.7: 1 for 2 style(s)"),
    *(("test", IN_TWO + f"--style_weights {each} {each}", f"--style_weights {each} {each}: numbers of 0 or more")
      for each in ("0", "1e+308")),
    ("test", IN_TWO + "--style_weights 1 1 --metrics ssim", "--metrics compares with one style picture"),
    ("test", IN_TWO + "--style_weights 1 1 --mask {tmp}/mask.png", "--mask: got style_weights, too"),
    ("test", TEST + "--mask {tmp}/mask.png", "--mask: got 1 style(s);"),
    ("test", IN_TWO + "--mask {tmp}/mask.png --cropsize 24", "--cropsize cuts the content alone"),
    ("test", IN_TWO + "--mask {tmp}/upright.png", "mask: 40 x 48 pixels, the content picture has 48 x 40"),
    ("test", IN_TWO + "--mask {tmp}/none.png", "{tmp}/none.png: no such file"),
    ("test", IN_TWO + "--mask ''", "--mask: got nothing"),
    ("test", IN_TWO + "--mask {tmp}/mask.png --save_path {tmp}/mask.png", "would overwrite --mask"),
    ("test", TEST + "--tile 71", "--tile 71: 72 pixels or more"),
)

PICTURES_AND_FILES = (
    ("train", TRAIN + "--content_dir {tmp}/cut.zip", "{tmp}/cut.zip: not a whole .zip archive"),
    ("train", TRAIN + "--content_dir {tmp}/photos.tar", "{tmp}/photos.tar: no such folder or .zip archive"),
    ("test", TEST + "--content {tmp}/cut.zip --save_path {tmp}/out", "{tmp}/cut.zip: not a whole .zip archive"),
    ("test", TEST + "--content {tmp}/content --save_path {tmp}/content/out",
     "--save_path {tmp}/content/out: belongs to --content {tmp}/content"),
    ("test", TEST + "--style {tmp}/style --style_weights 1 1 --save_path {tmp}/style/mixed.png",
     "--save_path {tmp}/style: belongs to --style {tmp}/style"),
)

SEVERAL = PRUNE + "--load_path {tmp}/model.pth {tmp}/narrow.pth --vgg_weights random "
PRUNING = (
    ("prune", PRUNE + "--prune_macs 0.5 --prune_num 1", "--prune_num and prune_layers all or prune_macs"),
    ("prune", PRUNE + "--prune_macs 0.5 --prune_channels 1", "--prune_channels and prune_layers all or prune_macs"),
    ("prune", PRUNE + "--prune_layers all --prune_num 1", "--prune_num and prune_layers all or prune_macs"),
    ("prune", PRUNE + "--prune_rank magnitude", "--prune_rank magnitude: how much is to be left, prune_macs says"),
    ("prune", PRUNE + "--prune_macs 0", "--prune_macs"),
    ("prune", PRUNE + "--prune_macs 0.001", "--prune_macs 0.001: a tenth of every layer's channels is kept"),
    ("prune", PRUNE + "--report_size 20", "--report_size 20: a multiple of 8, 16 or more"),
    ("prune", PRUNE + "--load_path {tmp}/model.pth {tmp}/model.pth", "model.pth: this model is named twice"),
    ("prune", SEVERAL + "--load_path {tmp}/model.pth {tmp}/vgg16.pth", "their losses are not comparable"),
    ("prune", SEVERAL + "--responses x.npz", "responses: they are of one model"),
    ("prune", SEVERAL + "--vgg_weights {tmp}/none.pth", "{tmp}/none.pth"),
    ("prune", SEVERAL + "--prune_nums 0 6", "prune_nums 6: "),
    ("prune", SEVERAL + "--cropsize 20", "cropsize 20: "),
    ("prune", SEVERAL + "--content_dir {tmp}/one", "several models are compared by other pictures than those"),
)

EXPORT = "--load_path {tmp}/model.pth --save_path {tmp}/"
EXPORTING = (
    ("export", EXPORT + "x.tflite", "a name that ends in .onnx, .pt2 or .safetensors is needed, or for a page one"),
    ("export", EXPORT + "x", "--save_path {tmp}/x: a name that ends in"),
    ("export", EXPORT + "x.pt2 --split", "--split: only for .onnx files"),
    ("export", EXPORT + "x/ --int8", "--int8: only for .onnx files"),
    ("export", EXPORT + "x.onnx --int8 --style_dir {tmp}", "--int8: content_dir is needed"),
    ("export", EXPORT + "x.onnx --int8 --style_dir {tmp} --content_dir {tmp} --holdout 0", "--int8 with holdout 0"),
    ("export", EXPORT + "x.onnx --style_dir {tmp}", "--style_dir: only a page has styles"),
    ("export", EXPORT + "model.pth/x.safetensors", "a folder is needed"),
    ("export", "--save_path {tmp}/x.safetensors --load_path {tmp}/none.pth", "{tmp}/none.pth: no such file"),
    ("export", EXPORT + "folder.pt2", "--save_path {tmp}/folder.pt2: is a folder"),
    ("export", EXPORT + "model.pt2 --load_path {tmp}/model.pt2", "{tmp}/model.pt2: would overwrite the model"),
)

ROWS = COMMAND_LINE + TRAINING + PAINTING + PICTURES_AND_FILES + PRUNING + EXPORTING


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of 6 channels in each layer, others narrower and of VGG16's shape, pictures, masks, folders of pictures,
    and what is none of these."""
    folder = tmp_path_factory.mktemp("files")
    whole = write_model(folder / "model.pth", small_network()).read_bytes()
    counts = {"content": 2, "style": 2, "some": 8, "one": 1}
    pictures = [f"{kind}/{each}.png" for kind, count in counts.items() for each in range(count)]
    for number, name in enumerate(["a.png", "b.png", *pictures]):
        write_noise(folder / name, (40, 48), number)
    for name, size in (("mask", (48, 40)), ("upright", (40, 48))):
        Image.new("L", size, 128).save(folder / f"{name}.png")
    write_model(folder / "vgg16.pth", small_network("vgg16"))
    write_model(folder / "narrow.pth", small_network(width=5))
    picture = (folder / "a.png").read_bytes()
    for name, content in (("text", b"text"), ("text.jpg", b"text"), ("broken/a.jpg", b"text"), ("empty.jpg", b""),
                          ("empty.pth", b""), ("cut.pth", whole[:9000]), ("cut.png", picture[:900]),
                          ("cut.zip", b"PK\3\4"), ("photos.tar", b"text"),
                          ("some/cut.png", picture[:900]), ("folder/notes.txt", b"text"),
                          ("folder.pt2/notes.txt", b"text"), ("model.pt2", whole)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    torch.save({"weights": 1}, folder / "other.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    return folder


@pytest.fixture
def tmp(files, tmp_path):
    """`files`, in a folder of the test's own."""
    return shutil.copytree(files, tmp_path / "files")


def shown_files(folder) -> dict:
    """What is in all files of the folder but hidden ones, as the lock of a run is."""
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


@pytest.mark.parametrize("mode, flags, words", ROWS)
def test_bad_input_is_one_line(mode, flags, words, capsys, tmp):
    before = shown_files(tmp)
    line = refusal(capsys, "--mode", mode, *shlex.split(flags.replace("{tmp}", str(tmp))))
    for word in words if isinstance(words, tuple) else (words,):
        assert word.replace("{tmp}", str(tmp)) in line
    assert shown_files(tmp) == before
